"""The cost model against the clock: predicted over measured CPU seconds, per pattern and length.

    python benchmarks/cost_model.py --lengths 2048,8192 --dtypes float32,bfloat16
    python benchmarks/cost_model.py --patterns blocks        # attention alone, over densities

Per case: dense attention, the estimator, and attention over what it selected. The model gets the
length and the work (tiles and columns that were selected) and nothing else; its constants are the
machine's own, timed at up to 8192 tokens. `cost()` is what the pattern's formula says of the work
before anything ran; where the input decides it is a bound. CPU time of one thread, the least of
some runs that take turns. Prints a table and the share of cases within 25%, saves JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mpass.calibration.instrument import AttentionOperands
from mpass.calibration.kernel_cost import count_work
from mpass.lowering.cpu import LOWERING as cpu
from mpass.lowering.cpu.cost_constants import (
    estimator_constants,
    least_seconds,
    machine_constants,
    one_thread,
)
from mpass.lowering.cpu.cost_model import DENSITY, TILES, predict
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex, empty_index
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.patterns.base import HEAD_DIM, LENGTH, Pattern, find_pattern, registered_patterns

RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.05, 0.15, 0.4, 1.0)
TOLERANCE = 0.25


@dataclass(frozen=True)
class Result:
    """One case; seconds of CPU time, predicted and measured, and the work as a share of dense."""

    pattern: str
    dtype: str
    length: int
    work: float
    formula: float
    dense: tuple[float, float]
    estimation: tuple[float, float]
    attention: tuple[float, float]

    @property
    def total(self) -> float:
        """Predicted over measured, estimation and attention together."""
        predicted, measured = (
            sum(pair) for pair in zip(self.estimation, self.attention, strict=True)
        )
        return predicted / measured

    @property
    def measured(self) -> tuple[str, str, str]:
        """Estimation over dense attention and over the op, and the op's speed-up."""
        dense, estimation = self.dense[1], self.estimation[1]
        op = estimation + self.attention[1]
        return f"{estimation / dense:.1%}", f"{estimation / op:.0%}", f"{dense / op:.1f}"

    @property
    def within(self) -> bool:
        return (
            abs(self.total - 1) <= TOLERANCE and abs(self.dense[0] / self.dense[1] - 1) <= TOLERANCE
        )


def random_blocks(query: Tensor, share: float) -> SparseIndex:
    """Lists of random key blocks, the diagonal one included: about `share` of the causal blocks."""
    rows, heads = query.shape[2] // BLOCK, query.shape[1]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(heads, rows, rows, generator=generator) < share
    chosen = (chosen | torch.eye(rows, dtype=torch.bool)).tril()
    index = empty_index(query, rows, IndexWidth(max_blocks=rows), tuple(range(heads)))
    index.block_count.copy_(chosen.sum(-1))
    order = torch.arange(rows).where(chosen, rows).sort(-1).values
    index.block_index.copy_(order.where(order < rows, 0))
    return index


def structured(length: int, heads: int, head_dim: int) -> Tensor:
    """Inputs with some structure: neighbours alike and a few strong keys, as in trained heads."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(1, heads, length, head_dim, generator=generator)
    drift = torch.randn(1, heads, length // BLOCK + 1, head_dim, generator=generator)
    return steps + 2 * drift.repeat_interleave(BLOCK, 2)[:, :, :length]


def measure(
    name: str,
    dtype: torch.dtype,
    length: int,
    heads: int,
    head_dim: int,
    repeats: int,
    share: float,
) -> Result:
    """Time one case, one kv head."""
    query = structured(length, heads, head_dim).to(dtype)
    key = query[:, :1].contiguous()
    mask, scale = AttentionMask(), head_dim**-0.5

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)

    runs, predicted, formula = [dense], 0.0, share
    if name == "blocks":
        index = random_blocks(query, share)
    else:
        pattern: Pattern = find_pattern(name)()

        def estimate(query: Tensor, key: Tensor) -> SparseIndex:
            every = range(query.shape[1])
            own = [pattern] * query.shape[1]
            return type(pattern).estimate(EstimateInputs(query, key, mask, every, scale), own)

        index = estimate(query, key)
        runs.append(lambda: estimate(query, key))
        found = estimator_constants(str(pattern), dtype, head_dim, heads, estimate)
        predicted = found.seconds(length, heads)
        sizes = {LENGTH: length, HEAD_DIM: head_dim}
        formula = float((pattern.cost() / (LENGTH**2 * HEAD_DIM)).subs(sizes))
    runs.append(lambda: cpu.sparse_attention(AttentionInputs(query, key, key, mask, scale), index))
    with one_thread():
        seconds = least_seconds(runs, repeats)

    tiles, columns = (
        float(part.sum()) / heads
        for part in count_work(index, AttentionOperands(0, query, key, key, mask, scale, 0.0, None))
    )
    # The model counts a density that makes these tiles, and keys per query that make the columns.
    empty = float(TILES.subs({DENSITY: 0, LENGTH: length}))
    whole = float(TILES.subs({DENSITY: 1, LENGTH: length}))
    columns = min(columns, whole - tiles)  # those inside of selected blocks are not computed twice
    costs = predict(
        machine_constants(dtype, head_dim, head_dim),
        length=length,
        heads=heads,
        kv_heads=1,
        density=(tiles - empty) / (whole - empty),
        columns=columns * BLOCK**2 / length,
    )
    return Result(
        pattern=name,
        dtype=str(dtype).removeprefix("torch."),
        length=length,
        work=(tiles + columns) / whole,
        formula=formula,
        dense=(costs.dense, seconds[0]),
        estimation=(predicted, seconds[1] if len(runs) == 3 else 0.0),
        attention=(costs.sparse, seconds[-1]),
    )


def table_of(results: list[Result]) -> Table:
    table = Table(title="predicted / measured CPU time of one thread")
    names = ("pattern", "dtype", "tokens", "work", "cost()", "dense", "index", "attend", "all")
    names += ("index/dense", "index/op", "x dense")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        parts = [f"{p / m:.2f}" if m else "-" for p, m in (r.dense, r.estimation, r.attention)]
        style = "" if r.within else "bold red"
        cells = (r.pattern, r.dtype, str(r.length), f"{r.work:.1%}", f"{r.formula:.1%}", *parts)
        table.add_row(*cells, f"{r.total:.2f}", *r.measured, style=style)
    return table


def main(
    lengths: Annotated[str, typer.Option(help="tokens")] = "2048,8192,32768",
    dtypes: Annotated[str, typer.Option()] = "float32,bfloat16",
    patterns: Annotated[str, typer.Option(help="names, or blocks for random ones")] = "",
    heads: Annotated[int, typer.Option()] = 2,
    head_dim: Annotated[int, typer.Option()] = 64,
    repeats: Annotated[int, typer.Option()] = 3,
    name: Annotated[str, typer.Option(help="file name under results/")] = "cost_model",
) -> None:
    """Measure, print a table, and save JSON under benchmarks/results/."""
    results = []
    for pattern in patterns.split(",") if patterns else ["blocks", *sorted(registered_patterns())]:
        for dtype in (getattr(torch, dtype) for dtype in dtypes.split(",")):
            for length in map(int, lengths.split(",")):
                for share in DENSITIES if pattern == "blocks" else (1.0,):
                    with torch.no_grad():
                        case = (pattern, dtype, length, heads, head_dim, repeats, share)
                        result = measure(*case)
                    results.append(result)
                    line = f"{pattern} {result.dtype} {length}: {result.total:.2f}"
                    print(line, file=sys.stderr, flush=True)
    good = sum(result.within for result in results)
    console = Console(width=130)
    console.print(table_of(results))
    console.print(f"{good} of {len(results)} cases within {TOLERANCE:.0%}")
    RESULTS.mkdir(exist_ok=True)
    payload = {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "heads": heads,
        "head_dim": head_dim,
        "results": [asdict(result) | {"ratio": result.total} for result in results],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(payload, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
