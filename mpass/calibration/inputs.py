"""The dense runs of a calibration: what every candidate loses and costs on every input."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpass.calibration.instrument import Operands, attend_dense
from mpass.calibration.kernel_cost import KernelCost, fit_kernel
from mpass.calibration.measure import LayerMeasures, measure_layer
from mpass.calibration.probe import Input, Probe
from mpass.calibration.settings import Announce, Settings
from mpass.calibration.state import State
from mpass.errors import CalibrationError
from mpass.patterns.base import Pattern


def measure_inputs(
    probe: Probe,
    items: Sequence[Input],
    candidates: Sequence[Pattern],
    settings: Settings,
    kept: State,
    announce: Announce,
) -> tuple[list[dict[int, LayerMeasures]], KernelCost, tuple[int, int]]:
    """Dense runs over all inputs; per input the measures of each layer.

    Also the kernels' cost at the longest text, and the numbers of query and kv heads.
    """
    longest = max((i for i in items if i.kind == "text"), key=lambda item: item.length)
    for number, item in enumerate(items):
        if f"input {number}" in kept:
            continue
        done = 0

        def attend(operands: Operands, number: int = number, item: Input = item) -> Tensor:
            nonlocal done
            key = f"measures {number} {operands.layer}"
            out = attend_dense(operands)
            if operands.mask.window > 0:  # cheap already, and its far keys are never seen
                return out
            if item is longest and "kernel" not in kept:
                kept["kernel"] = fit_kernel(operands).as_dict()
                kept["heads"] = [operands.num_heads, operands.key.shape[1]]
            if key not in kept:
                kept[key] = measure_layer(
                    operands,
                    candidates,
                    max_query_blocks=settings.query_blocks,
                    rows=None if item.kind == "text" else item.rows.tolist(),
                ).as_lists()
            done += 1
            total = len(probe.instrument.layers)
            announce(f"input {number + 1} of {len(items)}: layer {operands.layer}", done, total)
            return out

        probe.run(item.tokens, attend)
        kept[f"input {number}"] = probe.instrument.layers
    found: list[dict[int, LayerMeasures]] = []
    for number in range(len(items)):
        layers = kept[f"input {number}"]
        keys = {layer: f"measures {number} {layer}" for layer in layers}
        found.append(
            {
                layer: LayerMeasures.from_lists(kept[key])
                for layer, key in keys.items()
                if key in kept
            }
        )
    if not found[0]:
        reasons = "; ".join(sorted(set(probe.instrument.skipped))[:3]) or "no attention was found"
        raise CalibrationError(f"no layer can be made sparse: {reasons}")
    return found, KernelCost(**kept["kernel"]), tuple(kept["heads"])
