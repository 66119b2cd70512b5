"""The GPUs that costs are predicted for: rates, and what a launch takes; and which one is here.

Peak figures are the makers' data sheets. What attention reaches of them is measured where
`measured` says so, and assumed elsewhere: then it is what kernels of that kind reach on a chip of
that kind, chosen low for our kernels and high for dense attention, because a prediction decides
whether sparse attention runs at all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mpass.lowering.triton.spec import Target, target_of


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of GPU, as the cost model needs it.

    name: as `mpass explain --device` takes it; marks: parts of the names that drivers give it.
    target: whose tiles its kernels have; multiprocessors: SMs or compute units, each of which
    issues four instructions per cycle; gigahertz: of its clock under load.
    terabytes: bandwidth, TB/s; teraflops: of dense bf16 products, by the data sheet.
    dense, sparse: TFLOP/s that the best dense attention and our attention kernel reach on long
    prompts at head_dim 128; dense_half, sparse_half: tokens at which they reach half of that.
    products: TFLOP/s of an fp32 matrix product in torch.
    kernel, launch, op: microseconds that a kernel of little work takes on the device, that the host
    takes to launch a generated kernel, and that it takes for a torch op.
    measured: on what and with which versions the rates were measured; "" where they are assumed.
    """

    name: str
    marks: tuple[str, ...]
    target: Target
    multiprocessors: int
    gigahertz: float
    terabytes: float
    teraflops: float
    dense: float
    dense_half: float
    sparse: float
    sparse_half: float
    products: float = 50.0
    kernel: float = 3.5
    launch: float = 26.0
    op: float = 7.0
    measured: str = ""

    @property
    def cycles(self) -> float:
        """Cycles per second of all multiprocessors together."""
        return self.multiprocessors * self.gigahertz * 1e9


H100 = Chip("h100", ("H100",), "sm_90", 132, 1.755, 3.35, 989, 612, 1400, 348, 1600)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("a100", ("A100", "A800"), "sm_80", 108, 1.41, 2.04, 312, 210, 700, 150, 800, 19.0),
        H100,
        dataclasses.replace(H100, name="h200", marks=("H200",), terabytes=4.8),
        Chip("b200", ("B200",), "sm_100", 148, 1.85, 8.0, 2250, 1400, 3000, 500, 1600, 75.0),
        Chip("l40s", ("L40S",), "sm_80", 142, 2.52, 0.864, 362, 220, 700, 120, 800, 60.0),
        Chip("mi300x", ("MI300X",), "gfx942", 304, 2.1, 5.3, 1307, 500, 2000, 200, 2000, 100.0),
        Chip("rtx4090", ("4090",), "sm_80", 128, 2.52, 1.008, 165, 150, 500, 90, 600, 60.0),
    )
}
"""By name. A chip that is not here is the one of its target, see `unknown_chip`."""

OF_TARGET = {"sm_80": "a100", "sm_90": "h100", "sm_100": "b200", "gfx942": "mi300x"}
"""What stands for a chip that is not in the table."""


def find_chip(device_name: str, architecture: str, multiprocessors: int) -> Chip:
    """The chip of a device.

    device_name: as the driver gives it, "NVIDIA H200"; architecture: `sm_<capability>` or
    `gfx<version>`; multiprocessors: how many it has. A partition of a chip (MIG), or another make
    of it, has fewer than the table's: its rates shrink alike.
    """
    known = next((c for c in CHIPS.values() if any(m in device_name for m in c.marks)), None)
    if known is None:
        known = dataclasses.replace(CHIPS[OF_TARGET[target_of(architecture)]], measured="")
    share = multiprocessors / known.multiprocessors
    if share == 1.0:
        return known
    rates = ("terabytes", "teraflops", "dense", "sparse", "products")
    halves = ("dense_half", "sparse_half")
    scaled = {rate: getattr(known, rate) * share for rate in rates}
    scaled |= {half: getattr(known, half) * share for half in halves}
    return dataclasses.replace(known, multiprocessors=multiprocessors, measured="", **scaled)
