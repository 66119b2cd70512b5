"""A user's file that `make types` reads in strict mode: every public name, and two mistakes.

An unused `type: ignore` is an error there: the mistakes must be seen, and nothing else may be.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mpass

PATTERNS: tuple[mpass.Pattern, ...] = (
    mpass.AShape(64, 128),
    mpass.BlockMax(),
    mpass.BlockSparse(),
    mpass.BlockTopP(),
    mpass.Dense(),
    mpass.FlexPrefill(),
    mpass.SampleAttention(),
    mpass.Strided(),
    mpass.TriShape(),
    mpass.Union(),
    mpass.VerticalBlock(),
    mpass.VerticalSlash(1000, 512),
    mpass.XAttention(),
)


@mpass.configure(pattern="a_shape")
class Layer(nn.Module):
    """A decorated module stays a module."""


def compile_and_report(model: nn.Module) -> str:
    """The ways from a module to a report."""
    config = mpass.SparseConfig(default="union", layers={0: mpass.LayerConfig(mpass.Dense())})
    same: nn.Module = mpass.compile(model, config=config, min_seq_len=1024)
    mpass.register_attention()
    report: mpass.Report = mpass.last_report()
    earlier: tuple[mpass.Report, ...] = mpass.reports()
    with mpass.record() as records:
        same(torch.zeros(1))
    return f"{report.summary()} {len(earlier)} {records} {mpass.__version__}"


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The functions without a compiler."""
    try:
        share: Tensor = mpass.density(query, key, pattern="a_shape(64, 128)")
        heads: list[mpass.Pattern | str] = [mpass.Dense(), "a_shape(64, 128)", *PATTERNS]
        layer: Tensor = mpass.attend(
            query, key, value, patterns=heads, query_offset=64, softcap=30.0, layer=3
        )
        layer = mpass.attend(query, key, layer, patterns="union", sinks=share[0], key_mask=None)
        cells: Tensor = mpass.computed_mask(query, key, pattern=PATTERNS[0])
        layer = layer + mpass.sparse_attention(query, key, value, pattern="union")
        return layer * share.mean() + cells.sum()
    except (mpass.MpassError, mpass.errors.ShapeError) as error:
        raise SystemExit(str(error)) from error


def inspect(model: nn.Module, tokens: Tensor) -> str:
    """The tools."""
    explanation = mpass.explain(model, input_ids=tokens)
    profiled = mpass.profile(model, {"input_ids": tokens})
    rewritten = mpass.rewrite_exported(torch.export.export(model, (tokens,)))
    changes = mpass.diagnose(explanation).changes
    return f"{changes} {explanation} {profiled} {rewritten} {mpass.calibrate} {mpass.patterns}"


def shorten(model: nn.Module, tokens: Tensor) -> object:
    """A cache cut to what a prompt's end attends to."""
    chosen: mpass.SnapKV = mpass.SnapKV(budget=512)
    mpass.compile(model, kv_select=chosen)
    with mpass.select_keys(chosen) as found:
        selection: mpass.KVSelection = found
        output = model(tokens)
    return mpass.compress(output.past_key_values, selection, compact=model)


def in_tiles(model: nn.Module, side: int) -> nn.Module:
    """A vision model whose attention sees its patches in tiles."""
    grid: mpass.Grid = mpass.Grid((side, side), prefix=1)
    return mpass.compile(model, pattern="union", grid=grid)


def denoise(model: nn.Module, latents: Tensor) -> mpass.DenoisingRun:
    """A step of a sampler."""
    plan: mpass.DenoisingPlan = mpass.search_denoising(lambda run: model(latents), 9)
    with mpass.denoising(9, plan=plan) as run:
        model(latents)
        known: mpass.DenoisingRun = run
    return known


mpass.no_such_thing(1)  # type: ignore[attr-defined]
mpass.sparse_attention(1, 2, 3)  # type: ignore[call-overload]
