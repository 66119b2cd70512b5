"""Sparse attention on the CPU against torch's dense attention, FlexAttention and plain torch.

All runs of one case take turns in one process, and what is compared is process CPU time: on a
shared machine wall time measures the neighbours. Each run is timed right after one like it, as one
layer of a model follows another: after seconds of something else its memory has gone back to the
system, and a virtual machine may have to ask its host for it again. `OMP_WAIT_POLICY=PASSIVE` (set
here before torch is loaded) keeps threads that wait from counting as work.

    python benchmarks/attention_cpu.py --lengths 8192,16384 --dtypes float32,bfloat16
    python benchmarks/attention_cpu.py --flex --plain --patterns blocks
    python benchmarks/attention_cpu.py --int8 --patterns blocks --heads 9 --kv-heads 3
    python benchmarks/attention_cpu.py --int8 --no-dense --lengths 1048576 --densities 0.01 \
        --dtypes bfloat16 --head-dims 64 --heads 8 --kv-heads 2 --patterns blocks --repeats 1

speed-up: dense CPU time / sparse CPU time, estimation included for vertical-slash
pattern "default": the custom ops of a rewritten graph with the default config, as a whole; it may
choose dense attention, so its density and efficiency are those of all blocks

8 bits: CPU time / CPU time with scores in 8 bits, and how far those results are from the others
(relative length); peak: the most memory that the process held, inputs included

efficiency: speed-up of the attention alone x share of the causal cells computed; 1.0 is dense
attention's own rate
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mpass.config.sparse_config import builtin_default
from mpass.inspection.text_table import open_console
from mpass.lowering.cpu import LOWERING as cpu
from mpass.lowering.density import density
from mpass.lowering.estimators import VERTICAL_SLASH
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    list_slots,
)
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.options import Options
from mpass.patterns.base import head_slots, index_op

RESULTS = Path(__file__).parent / "results"
BUDGETS = {8192: (512, 24 * BLOCK), 16384: (768, 24 * BLOCK), 32768: (1000, 32 * BLOCK)}
"""Columns and token diagonals of vertical-slash; the nearest length's for others."""

Runs = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Result:
    """One case; seconds are medians of CPU time, all threads together."""

    pattern: str
    dtype: str
    length: int
    head_dim: int
    heads: int
    kv_heads: int
    density: float
    seconds: dict[str, float]
    speedup: float | None
    efficiency: float | None
    estimation_share: float
    index_bytes: int
    index_share_of_kv: float
    int8_error: float | None
    peak_bytes: int


def random_blocks(query: Tensor, share: float, generator: torch.Generator) -> SparseIndex:
    """Lists of random key blocks, the diagonal one included: about `share` of the causal cells.

    Half of the diagonal block's cells are not causal, so a list of w blocks counts as w - 1/2.
    """
    rows = query.shape[2] // BLOCK
    width = rows if share >= 1 else max(2, round(rows * (1 - (1 - share) ** 0.5) + 0.5))
    index = empty_index(query, rows, IndexWidth(max_blocks=width), list_slots(query.shape[1]))
    for head in range(query.shape[1]):
        for i in range(rows):
            count = min(i + 1, width)
            others = torch.randperm(i, generator=generator)[: count - 1]
            entries = torch.cat([others, torch.tensor([i])]).sort().values
            index.block_count[:, head, i] = count
            index.block_index[:, head, i, :count] = entries
    return index


def cpu_seconds(runs: Runs, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each run, right after one that is not timed; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            run()
            start = time.process_time()
            run()
            samples[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in samples.items()}


def flex_run(query: Tensor, key: Tensor, value: Tensor, index: SparseIndex) -> Callable[[], object]:
    """FlexAttention over the same blocks: the diagonal ones masked, the others full."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    rows = query.shape[2] // BLOCK
    count = index.block_count
    full = torch.nn.functional.pad(index.block_index, (0, rows - index.block_index.shape[-1]))
    diagonal = torch.zeros_like(full)
    diagonal[..., 0] = torch.arange(rows)
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(count),
        diagonal,
        count - 1,
        full,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda b, h, q, k: q >= k,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def op_run(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], object]:
    """The ops that a rewritten graph calls with the default config, estimation included."""
    options = Options()
    cls = type(builtin_default("cpu"))
    heads = list(range(query.shape[1]))
    values = [[getattr(cls(), field.name)] * len(heads) for field in fields(cls)]
    limits = (options.dense_above, options.shortest)
    scale = query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]
    slots = list(head_slots([cls()] * len(heads), heads, group))

    def run() -> Tensor:
        index = index_op(cls)(query, key, None, heads, 0, 0, True, scale, *limits, *values)
        out: Tensor = torch.ops.minference.sparse_attention(
            query, key, value, *index, slots, None, None, 0, 0, True, scale, 0.0, *limits, 0
        )
        return out

    return run


def measure(
    pattern: str,
    dtype: torch.dtype,
    length: int,
    head_dim: int,
    heads: int,
    kv_heads: int,
    share: float,
    *,
    repeats: int,
    flex: bool,
    plain: bool,
    int8: bool,
    dense: bool,
) -> Result:
    """Time one case."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, head_dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    key, value = (
        torch.randn(1, kv_heads, length, head_dim, generator=generator).to(dtype) for _ in "kv"
    )
    mask, scale = AttentionMask(), head_dim**-0.5
    runs: Runs = {}
    if dense:
        runs["dense"] = lambda: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
    if pattern == "vertical_slash":
        columns, diagonals = BUDGETS[min(BUDGETS, key=lambda known: abs(known - length))]
        index = vertical_slash(query, key, mask, columns, diagonals)
        runs["estimate"] = lambda: vertical_slash(query, key, mask, columns, diagonals)
    else:
        index = random_blocks(query, 1.0 if pattern == "default" else share, generator)
    runs["sparse"] = lambda: cpu.sparse_attention(
        AttentionInputs(query, key, value, mask, scale), index
    )
    if pattern == "default":
        runs["sparse"] = op_run(query, key, value)
    int8_error = None
    if int8:
        in_int8 = AttentionInputs(query, key, value, mask, scale, int8=True)
        runs["int8"] = lambda: cpu.sparse_attention(in_int8, index)
        inputs = AttentionInputs(query, key, value, mask, scale)
        exact = cpu.sparse_attention(inputs, index).float()
        found = cpu.sparse_attention(in_int8, index).float()
        int8_error = ((found - exact).norm() / exact.norm()).item()
        del exact, found
    if flex and pattern == "blocks":
        runs["flex"] = flex_run(query, key, value, index)
    if plain:
        runs["plain"] = lambda: reference.sparse_attention(
            AttentionInputs(query, key, value, mask, scale), index
        )
    seconds = cpu_seconds(runs, repeats)
    computed = density(index, mask, batch=1, num_queries=length, num_keys=length).mean().item()
    total = seconds["sparse"] + seconds.get("estimate", 0.0)
    return Result(
        pattern=pattern,
        dtype=str(dtype).removeprefix("torch."),
        length=length,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        density=computed,
        seconds=seconds,
        speedup=seconds["dense"] / total if dense else None,
        efficiency=seconds["dense"] / seconds["sparse"] * computed if dense else None,
        estimation_share=seconds.get("estimate", 0.0) / total,
        index_bytes=index.num_bytes(),
        index_share_of_kv=index.num_bytes() / (2 * key.numel() * key.element_size()),
        int8_error=int8_error,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def vertical_slash(
    query: Tensor, key: Tensor, mask: AttentionMask, columns: int, diagonals: int
) -> SparseIndex:
    """Estimate; keep diagonals / BLOCK of the block diagonals found, spread over all distances.

    Trained heads have their diagonals side by side, so that a budget of d token diagonals makes
    about d / BLOCK block diagonals; those of random inputs lie anywhere and would make many more.
    """
    heads = list(range(query.shape[1]))
    inputs = EstimateInputs(query, key, mask, heads, query.shape[-1] ** -0.5)
    rules = [VerticalSlashRule(columns, diagonals)] * len(heads)
    index = cpu.estimate(VERTICAL_SLASH)(inputs, rules)
    kept = diagonals // BLOCK
    found = int(index.diagonal_count.min())
    if kept < found:
        chosen = torch.linspace(0, found - 1, kept).long()
        index.diagonal_index[..., :kept] = index.diagonal_index[..., chosen]
        index.diagonal_index[..., kept:] = 0
        index.diagonal_count.fill_(kept)
    return index


def table_of(results: list[Result]) -> Table:
    table = Table(title=f"CPU attention, {torch.get_num_threads()} threads, ratios of CPU time")
    for name in ("pattern", "dtype", "tokens", "D", "density", "speed-up", "efficiency"):
        table.add_column(name, justify="right")
    for name in (
        "x flex",
        "x plain",
        "8 bits",
        "error",
        "estimation",
        "index / KV",
        "CPU s",
        "peak",
    ):
        table.add_column(name, justify="right")
    for result in results:
        sparse = result.seconds["sparse"]

        def ratio(name: str, result: Result = result, sparse: float = sparse) -> str:
            return f"{result.seconds[name] / sparse:.1f}" if name in result.seconds else "-"

        table.add_row(
            result.pattern,
            result.dtype,
            str(result.length),
            str(result.head_dim),
            f"{result.density:.1%}",
            "-" if result.speedup is None else f"{result.speedup:.2f}",
            "-" if result.efficiency is None else f"{result.efficiency:.2f}",
            ratio("flex"),
            ratio("plain"),
            f"{sparse / result.seconds['int8']:.2f}" if "int8" in result.seconds else "-",
            "-" if result.int8_error is None else f"{result.int8_error:.4f}",
            f"{result.estimation_share:.1%}",
            f"{result.index_share_of_kv:.2%}",
            f"{sparse:.3g}",
            f"{result.peak_bytes / 1e9:.2f} GB",
        )
    return table


def plot(results: list[Result], path: Path) -> None:
    """Speed-up over density, one panel per dtype, one line per pattern, length and head_dim."""
    try:
        from matplotlib import pyplot
    except ImportError:
        open_console().print("no plot: `pip install matplotlib` draws one")
        return
    dtypes = sorted({result.dtype for result in results}, reverse=True)
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 4.5), sharey=True, squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        lines: dict[tuple[object, ...], list[Result]] = {}
        for result in results:
            if result.dtype == dtype:
                name = (result.pattern, "" if result.pattern == "vertical_slash" else result.length)
                lines.setdefault((*name, result.head_dim), []).append(result)
        for (pattern, length, head_dim), members in lines.items():
            members.sort(key=lambda result: result.density)
            tokens = f"{length} tokens" if length else "with its estimate"
            axes.plot(
                [member.density for member in members],
                [member.speedup for member in members],
                marker="o" if length else "s",
                label=f"{str(pattern).replace('_', '-')}, {tokens}, head_dim {head_dim}",
            )
        ideal = [min(result.density for result in results), 1.0]
        axes.plot(
            ideal, [1 / x for x in ideal], "--", color="grey", label="SDPA's rate: 1 / density"
        )
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="share of causal cells computed")
        axes.legend(fontsize=8)
    panels[0][0].set_ylabel("speed-up over torch SDPA")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    lengths: Annotated[str, typer.Option(help="tokens")] = "8192,16384",
    densities: Annotated[str, typer.Option(help="share of causal blocks")] = "0.05,0.1,0.3,1.0",
    dtypes: Annotated[str, typer.Option()] = "float32,bfloat16",
    head_dims: Annotated[str, typer.Option()] = "64,128",
    patterns: Annotated[
        str, typer.Option(help="blocks, vertical_slash, default")
    ] = "blocks,vertical_slash",
    heads: Annotated[int, typer.Option()] = 4,
    kv_heads: Annotated[int, typer.Option()] = 1,
    repeats: Annotated[int, typer.Option()] = 5,
    flex: Annotated[bool, typer.Option(help="time FlexAttention on the same blocks")] = False,
    plain: Annotated[bool, typer.Option(help="time the plain-torch op")] = False,
    int8: Annotated[bool, typer.Option(help="time scores in 8 bits")] = False,
    dense: Annotated[bool, typer.Option(help="time torch's own attention")] = True,
    name: Annotated[str, typer.Option(help="file name under results/")] = "attention_cpu",
) -> None:
    """Measure, print a table, and save JSON and a plot under benchmarks/results/."""
    console, results = open_console(), []
    for pattern in patterns.split(","):
        for dtype in (getattr(torch, dtype) for dtype in dtypes.split(",")):
            for length in map(int, lengths.split(",")):
                for head_dim in map(int, head_dims.split(",")):
                    shares = densities.split(",") if pattern == "blocks" else ["1"]
                    for share in map(float, shares):
                        result = measure(
                            pattern,
                            dtype,
                            length,
                            head_dim,
                            heads,
                            kv_heads,
                            share,
                            repeats=repeats,
                            flex=flex,
                            plain=plain,
                            int8=int8,
                            dense=dense,
                        )
                        results.append(result)
    console.print(table_of(results))
    RESULTS.mkdir(exist_ok=True)
    payload = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "results": [asdict(result) for result in results],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(payload, indent=2) + "\n")
    if dense:
        plot(results, RESULTS / f"{name}.png")


if __name__ == "__main__":
    typer.run(main)
