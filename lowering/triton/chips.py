"""The GPUs that costs are predicted for: rates, and what a launch takes; and which one is here.

Peak figures are the makers' data sheets. What attention reaches of them was measured on an H200
(torch 2.11, CUDA 13.0, Triton 3.6; dense attention: benchmarks/results/gpu_h200_1.json, our
kernels: gpu_h200_3.json). For other chips it is assumed: what such kernels reach on a chip of that
kind, chosen low for ours and high for dense attention, because a prediction decides whether sparse
attention runs at all.
"""

from __future__ import annotations

import bisect
import dataclasses
from dataclasses import dataclass

from mpass.lowering.triton.spec import Target, target_of

DENSE_CURVE = (
    (2048, 405.0),
    (4096, 482.0),
    (8192, 617.0),
    (16384, 613.0),
    (32768, 596.0),
    (131072, 564.0),
    (1048576, 475.0),
)
"""TFLOP/s of the best dense attention (cuDNN 9.19) of an H200 by the tokens of a prompt, 32 heads
over 8, head_dim 128, bf16. Long prompts run into the chip's power limit."""

DENSE_RATE = 613.0
"""The rate of that curve by which chips are compared, at 16384 tokens."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One kind of GPU, as the cost model needs it.

    name: as `mpass explain --device` takes it; marks: parts of the names that drivers give it.
    target: whose tiles its kernels have; multiprocessors: SMs or compute units, each of which
    issues four instructions per cycle; gigahertz: of its clock under load.
    terabytes: bandwidth, TB/s; teraflops: of dense bf16 products, by the data sheet.
    dense, sparse: TFLOP/s that the best dense attention reaches on 16384 tokens at head_dim 128,
    and our attention kernel on query blocks that look at many key blocks.
    products: TFLOP/s of an fp32 matrix product in torch.
    kernel: microseconds that a kernel of little work takes on the device. launch, op: those that
    the host takes to launch a generated kernel and a torch op; of the host, and not of the chip,
    and measured before launches went straight to compiled handles, which can only take less.
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
    sparse: float
    products: float
    kernel: float = 3.5
    launch: float = 150.0
    op: float = 25.0
    measured: str = ""

    @property
    def cycles(self) -> float:
        """Cycles per second of all multiprocessors together."""
        return self.multiprocessors * self.gigahertz * 1e9

    def dense_rate(self, length: float) -> float:
        """TFLOP/s of the best dense attention over a prompt: `DENSE_CURVE`, scaled.

        A slower chip is busy with shorter prompts, as the square root of its rate has it.
        """
        share = self.dense / DENSE_RATE
        return share * on_curve(length * share**-0.5)


def on_curve(length: float) -> float:
    """`DENSE_CURVE` between its points; before the first, rates fall as the lengths do."""
    place = bisect.bisect_left([tokens for tokens, _ in DENSE_CURVE], length)
    if place == 0:
        return DENSE_CURVE[0][1] * length / DENSE_CURVE[0][0]
    if place == len(DENSE_CURVE):
        return DENSE_CURVE[-1][1]
    (n1, r1), (n2, r2) = DENSE_CURVE[place - 1 : place + 1]
    return r1 + (r2 - r1) * (length - n1) / (n2 - n1)


ON_H200 = "NVIDIA H200, torch 2.11.0, CUDA 13.0, Triton 3.6.0"

H200 = Chip(
    "h200", ("H200",), "sm_90", 132, 1.755, 4.8, 989, DENSE_RATE, 422.0, 40.0, measured=ON_H200
)
H100 = dataclasses.replace(
    H200, name="h100", marks=("H100",), terabytes=3.35, sparse=395.0, measured=""
)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("a100", ("A100", "A800"), "sm_80", 108, 1.41, 2.04, 312, 210, 150, 18.0),
        H100,
        H200,
        Chip("b200", ("B200",), "sm_100", 148, 1.85, 8.0, 2250, 1400, 500, 70.0),
        Chip("l40s", ("L40S",), "sm_80", 142, 2.52, 0.864, 362, 220, 120, 60.0),
        Chip("mi300x", ("MI300X",), "gfx942", 304, 2.1, 5.3, 1307, 500, 200, 100.0),
        Chip("rtx4090", ("4090",), "sm_80", 128, 2.52, 1.008, 165, 150, 90, 60.0),
    )
}
"""By name. A chip that is not here is taken to be the one of its target, see `OF_TARGET`."""

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
    scaled = {rate: getattr(known, rate) * share for rate in rates}
    return dataclasses.replace(known, multiprocessors=multiprocessors, measured="", **scaled)
