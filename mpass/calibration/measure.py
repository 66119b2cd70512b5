"""What each candidate pattern loses in one layer, measured on the exact attention.

Exact weights are computed for some blocks of 64 queries, all their keys at once: memory is O(N).
Letters: C candidates, H query heads, Nk keys, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.calibration.instrument import AttentionOperands, attend_dense, estimate_heads
from mpass.calibration.kernel_cost import KernelCost, count_work, fit_kernel, read_clock
from mpass.calibration.probe import Input, Probe
from mpass.calibration.settings import OnProgress, Settings
from mpass.calibration.state import State
from mpass.errors import CalibrationError
from mpass.inspection.recall import evenly_spaced
from mpass.lowering.index import (
    BLOCK,
    SparseIndex,
    first_query_block,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import Pattern


@dataclass(frozen=True, eq=False)
class LayerMeasures:
    """One layer, all candidates; fp64 [C, H] but for `estimation`.

    error: squared distance of a head's output to the exact one, mean over the rows looked at;
    recall: exact attention mass on the computed keys; tiles, columns: work, as of count_work;
    estimation: seconds that finding the keys of all heads took, fp64 [C].
    """

    error: Tensor
    recall: Tensor
    tiles: Tensor
    columns: Tensor
    estimation: Tensor

    def as_lists(self) -> dict[str, list]:
        """For JSON."""
        return {name: getattr(self, name).tolist() for name in self.__dataclass_fields__}

    @classmethod
    def from_lists(cls, values: dict[str, list]) -> LayerMeasures:
        """What `as_lists` gave."""
        return cls(**{name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()})


@torch.no_grad()
def measure_layer(
    operands: AttentionOperands,
    candidates: Sequence[Pattern],
    *,
    max_query_blocks: int,
    rows: Sequence[int] | None = None,
) -> LayerMeasures:
    """Try all candidates on all heads of a layer.

    rows: positions (of queries) that count, e.g. those that predict an answer; all rows of
    `max_query_blocks` evenly spread blocks if not given.
    """
    indexes, estimation = [], []
    device = operands.query.device
    for candidate in candidates:
        start = read_clock(device)
        indexes.append(estimate_heads(operands, [candidate] * operands.num_heads))
        estimation.append(read_clock(device) - start)
    work = [count_work(index, operands) for index in indexes]

    first = first_query_block(operands.mask.query_offset)
    blocks = num_query_blocks(operands.query.shape[2], operands.mask.query_offset)
    if rows is None:
        local = evenly_spaced(blocks, max_query_blocks)
    else:
        local = sorted({(operands.mask.query_offset + row) // BLOCK - first for row in rows})
    error = torch.zeros(len(candidates), operands.num_heads, dtype=torch.float64)
    recall = torch.zeros_like(error)
    count = 0
    tables = [
        reference.selected_columns(index, operands.query.shape[0], operands.key.shape[2])
        for index in indexes
    ]
    for row in local:
        kept, lost, looked = compare_block(operands, indexes, tables, row, row + first, rows)
        recall += kept.cpu()
        error += lost.cpu()
        count += looked
    return LayerMeasures(
        error / max(1, count),
        recall / max(1, count),
        torch.stack([tiles for tiles, _ in work]),
        torch.stack([columns for _, columns in work]),
        torch.tensor(estimation, dtype=torch.float64),
    )


def compare_block(
    operands: AttentionOperands,
    indexes: Sequence[SparseIndex],
    tables: Sequence[Tensor],
    row: int,
    block: int,
    rows: Sequence[int] | None,
) -> tuple[Tensor, Tensor, int]:
    """Recall and squared output error of one query block, summed over its rows: two fp64 [C, H].

    tables: per candidate, its vertical columns [B, H, Nk]; row: of the index's lists; block: on the
    absolute grid. Also returns how many rows were looked at.

    Weights times values are summed per key block once, and per candidate only over blocks: all of
    them together cost little more than one.
    """
    offset, device = operands.mask.query_offset, operands.query.device
    start, stop = max(0, block * BLOCK - offset), (block + 1) * BLOCK - offset
    picked = range(start, min(stop, operands.query.shape[2]))
    if rows is not None:
        wanted = set(rows)
        picked = [r for r in picked if r in wanted]  # type: ignore[assignment]
    seen = min(operands.key.shape[2], offset + stop)
    blocks = num_key_blocks(seen)
    padding = blocks * BLOCK - seen
    weights = F.pad(exact_weights(operands, picked, seen), (0, padding))
    values = F.pad(operands.value[:, :, :seen].float(), (0, 0, 0, padding))
    values = reference.repeat_kv(values, operands.num_heads)
    per_block = weights.unflatten(-1, (blocks, BLOCK))  # [B, H, R, J, BLOCK]
    mass = per_block.sum(-1)
    parts = per_block.transpose(2, 3) @ values.unflatten(2, (blocks, BLOCK))  # [B, H, J, R, Dv]
    exact = parts.sum(2)

    at = tuple(torch.tensor([number], device=device) for number in (row, block))
    chosen = torch.stack(
        [
            reference.selected_blocks(i, at[0], at[1], blocks, stop=block + 1)[:, :, 0]
            for i in indexes
        ],
        2,
    )
    share = chosen.to(weights.dtype)  # [B, H, C, J]
    kept = share @ mass.mT  # [B, H, C, R]
    out = (share @ parts.flatten(3)).unflatten(-1, parts.shape[3:])  # [B, H, C, R, Dv]
    for number, table in enumerate(tables):
        extra = F.pad(table[..., :seen], (0, padding)) & ~chosen[:, :, number].repeat_interleave(
            BLOCK, -1
        )
        extra[..., block * BLOCK :] = False
        count = int(extra.sum(-1).amax())
        if count == 0:
            continue
        # The columns of every head, filled up with others whose weight is put to zero.
        which = extra.to(torch.uint8).topk(count, -1).indices
        live = extra.gather(-1, which)
        there = which[..., None].expand(-1, -1, -1, values.shape[-1])
        some = weights.gather(-1, which[:, :, None].expand(-1, -1, weights.shape[2], -1))
        some = some * live[:, :, None]
        kept[:, :, number] += some.sum(-1)
        out[:, :, number] += some @ values.gather(2, there)
    error = out / kept.clamp(min=1e-20)[..., None] - exact[:, :, None]
    lost = error.double().square().sum((0, 3, 4)).T
    return kept.double().sum((0, 3)).T, lost, len(picked) * operands.query.shape[0]


def exact_weights(operands: AttentionOperands, rows: Sequence[int], seen: int) -> Tensor:
    """Softmax weights of some queries over the first `seen` keys: fp32 [B, H, rows, seen]."""
    positions = torch.tensor(rows, device=operands.query.device) + operands.mask.query_offset
    keys = reference.repeat_kv(operands.key[:, :, :seen], operands.num_heads).float()
    scores = operands.query[:, :, list(rows)].float() @ keys.mT * operands.scale
    if operands.softcap > 0:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    allowed = reference.allowed_cells(operands.mask, positions, operands.key.shape[2])[..., :seen]
    return reference.masked_softmax(scores, allowed, operands.sinks)


def measure_inputs(
    probe: Probe,
    items: Sequence[Input],
    candidates: Sequence[Pattern],
    settings: Settings,
    kept: State,
    on_progress: OnProgress,
    check: Callable[[dict[int, LayerMeasures], int, KernelCost], None] = lambda *_: None,
) -> tuple[list[dict[int, LayerMeasures]], KernelCost, tuple[int, int]]:
    """Dense runs over all inputs, the longest text first; per input the measures of each layer.

    check: is told the layers of the longest text that are measured so far, how many come after
    them, and the kernels' cost; what it raises ends the measuring.

    Also the kernels' cost at the longest text, and the numbers of query and kv heads.
    """
    longest = max((i for i in items if i.kind == "text"), key=lambda item: item.length)
    order = sorted(range(len(items)), key=lambda number: items[number] is not longest)
    for number, item in ((number, items[number]) for number in order):
        if f"input {number}" in kept:
            continue
        done = 0

        def attend(operands: AttentionOperands, number: int = number, item: Input = item) -> Tensor:
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
            if item is longest:
                measured = {
                    layer: LayerMeasures.from_lists(kept[f"measures {number} {layer}"])
                    for layer in probe.instrument.layers
                    if f"measures {number} {layer}" in kept
                }
                after = sum(layer > operands.layer for layer in probe.instrument.layers)
                check(measured, after, KernelCost(**kept["kernel"]))
            on_progress(f"input {number + 1} of {len(items)}: layer {operands.layer}", done, total)
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
