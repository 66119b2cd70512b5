"""What is measured, as named pieces of work: each gives one row of the results.

A piece is skipped when its row is there already. Names read `section/detail/length`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import check, check_calls, densities, models, rivals
from benchmarks.gpu.check_long import check_long
from benchmarks.gpu.clock import milliseconds
from benchmarks.gpu.inputs import computed_flops, dense_index, list_index
from benchmarks.gpu.layer import Estimator, time_layer
from benchmarks.gpu.machine import machine
from benchmarks.gpu.setting import SLASH, TOP_K, VERTICAL, Row, Setting, Work
from benchmarks.gpu.training import training, training_checks
from mpass.lowering.estimators import BLOCK_SPARSE, SAMPLE_ATTENTION, VERTICAL_SLASH
from mpass.lowering.estimators import Estimator as IndexEstimator
from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex, num_query_blocks
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference.block_sparse import BlockSparseRule
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.lowering.triton import LOWERING as lowering
from mpass.lowering.triton.interpret import interpreted_language
from mpass.lowering.triton.union import vertical_block_index_by
from mpass.patterns.base import find_pattern
from mpass.patterns.base.scored import ListPattern, shared_index
from mpass.patterns.sample_attention import SampleAttention

DENSITIES = (0.01, 0.05, 0.2)
SLOWEST = 8.0
"""Dense attention that takes longer than this many seconds at 300 TFLOP/s runs once, unwarmed."""


def all_work(setting: Setting) -> Iterator[Work]:
    """Everything, in order of what is worth knowing first."""
    yield from checks(setting)
    yield from long_checks(setting)
    yield from training_checks(setting)
    yield from check_calls.calls(setting)
    yield from machine(setting)
    for length in setting.lengths:
        yield from layers(setting, length)
        yield from attention(setting, length)
        yield from estimation(setting, length)
        yield from whole(setting, length)
        for name, estimate in ESTIMATORS.items():
            yield f"capture/{name}/{length}", functools.partial(capture, setting, length, estimate)
    yield from training(setting, ESTIMATORS)
    yield from models.crossover(setting)
    yield from models.prefills(setting)


def checks(setting: Setting) -> Iterator[Work]:
    """Every flag at the usual sizes; at the others all of them at once, and none.

    Each check compiles a dozen kernels of its own.
    """
    every, few = list(check.FLAGS), ["plain", "all"]
    half = {128: every, 64: every, 80: few, 96: few, 192: few, 256: few}
    wanted = {torch.bfloat16: half, torch.float16: half | {64: few}}
    if setting.smoke:
        wanted = {torch.float32: {32: every}}
    for dtype, dims in wanted.items():
        for dim, names in dims.items():
            for name in names:
                length = 130 if setting.smoke else 1000
                flags = check.FLAGS[name]
                yield (
                    f"check/{name}/{str(dtype).removeprefix('torch.')}/{dim}",
                    functools.partial(
                        check.check_layer, setting.device, dtype, dim, length=length, **flags
                    ),
                )


LONG_CHECKS = (8197, 70001)
"""Lengths beyond one chunk, and beyond one turn, of every kernel, and no multiple of a block."""


LONGEST_CHECK = 1048576
LONGEST_CHECKED = ("union", "block top k", "vertical slash")
"""Checked at a length whose tensors have more elements than 32 bits can count, one at a time."""


def long_checks(setting: Setting) -> Iterator[Work]:
    """Every estimator and its attention at lengths where short checks see nothing."""
    for length in (131,) if setting.smoke else (*LONG_CHECKS, LONGEST_CHECK):
        for name, estimate in ESTIMATORS.items():
            if length == LONGEST_CHECK and name not in LONGEST_CHECKED:
                continue
            work = functools.partial(check_long, setting, length, estimate)
            yield f"check/long {name}/{length}", work


def layers(setting: Setting, length: int) -> Iterator[Work]:
    """A layer whole, by each estimator with its default rule."""
    for name, estimate in ESTIMATORS.items():
        work = functools.partial(time_layer, setting, length, estimate)
        yield f"layer/{name}/{length}", work


def attention(setting: Setting, length: int) -> Iterator[Work]:
    for density in (*DENSITIES, 1.0):
        yield (
            f"attention/density {density:g}/{length}",
            functools.partial(sparse_attention, setting, length, density),
        )
    for name in densities.recorded():
        yield (
            f"attention/densities of {name}/{length}",
            functools.partial(recorded_attention, setting, length, name),
        )
    for name, backend in rivals.BACKENDS.items():
        if not (setting.smoke and backend):
            yield f"attention/{name}/{length}", functools.partial(dense, setting, length, backend)
    if length <= rivals.FLEX_LIMIT:
        for density in DENSITIES[1:]:
            yield (
                f"attention/flex {density:g}/{length}",
                functools.partial(flex, setting, length, density),
            )
        yield f"attention/flex 128 0.05/{length}", functools.partial(flex_wide, setting, length)
    if length <= rivals.FLEX_LIMIT:
        yield f"attention/in-kernel gather/{length}", functools.partial(gather, setting, length)


def sparse_attention(setting: Setting, length: int, density: float) -> Row:
    """The attention op alone over random lists, or over everything."""
    query, key, value = setting.tensors(length)
    index = dense_index(query) if density == 1.0 else list_index(query, density)
    return time_attention(setting, query, key, value, index) | {"density": density}


def recorded_attention(setting: Setting, length: int, pattern: str) -> Row:
    """The attention op alone over random lists whose heads have a real prompt's densities."""
    query, key, value = setting.tensors(length)
    shares = densities.load_densities(pattern, length, query.shape[1])
    row = time_attention(setting, query, key, value, list_index(query, shares))
    return row | {"density": statistics.fmean(shares)}


def time_attention(
    setting: Setting,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: SparseIndex,
) -> Row:
    inputs = AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5)
    attend = functools.partial(lowering.sparse_attention, inputs, index)
    spent = milliseconds(attend, setting.device)
    flops = computed_flops(index, query.shape[2], query.shape[-1])
    kv_bytes = 2 * key.numel() * key.element_size()
    return {
        "ms": spent,
        "tflops": flops / spent / 1e9,
        "index_share_of_kv": index.num_bytes() / kv_bytes,
    }


def dense(setting: Setting, length: int, backend: SDPBackend | None) -> Row:
    shape = setting.shape(length)
    query, key, value = setting.tensors(length)
    attend = functools.partial(rivals.sdpa, query, key, value, backend)
    warm_up = shape.dense_flops / 300e12 < SLOWEST
    spent = milliseconds(attend, setting.device, warm_up=warm_up)
    return {"ms": spent, "tflops": shape.dense_flops / spent / 1e9}


def flex(setting: Setting, length: int, density: float) -> Row:
    query, key, value = setting.tensors(length)
    index = list_index(query, density)
    attend = rivals.flex(query, key, value, index, compiled=not setting.smoke)
    row = {"ms": milliseconds(attend, setting.device)}
    if setting.smoke:  # uncompiled, it computes all that its mask allows, whatever the blocks
        return row
    ours = lowering.sparse_attention(
        AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5), index
    )
    return row | {"difference": float((ours.float() - attend().float()).abs().max())}


def flex_wide(setting: Setting, length: int) -> Row:
    """FlexAttention over blocks of 128, its own default, at density 0.05."""
    query, key, value = setting.tensors(length)
    index = list_index(query[:, :, : length // 2], 0.05)  # of half as many, twice as large blocks
    attend = rivals.flex(query, key, value, index, compiled=not setting.smoke, block=2 * BLOCK)
    return {"ms": milliseconds(attend, setting.device)}


def gather(setting: Setting, length: int) -> Row:
    """The paper's kernel and ours on one vertical-slash index."""
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = setting.smoke
        from benchmarks.gpu.gather_kernel import gather_attention, row_lists

    query, key, value = setting.tensors(length)
    index = vertical_slash(query, key)
    lists = row_lists(index, length)

    def attend() -> torch.Tensor:
        with interpreted_language() if setting.smoke else contextlib.nullcontext():
            return gather_attention(query, key, value, lists)

    ours = time_attention(setting, query, key, value, index)
    sparse = lowering.sparse_attention(
        AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5), index
    )
    difference = float((sparse.float() - attend().float()).abs().max())
    spent = milliseconds(attend, setting.device)
    return {"ms": spent, "ours_ms": ours["ms"], "difference": difference}


def run_estimator(
    estimator: IndexEstimator, query: torch.Tensor, key: torch.Tensor, rule: object
) -> SparseIndex:
    """An estimator with one rule for all heads, by the generated kernels."""
    heads = range(query.shape[1])
    inputs = EstimateInputs(query, key, AttentionMask(), heads, query.shape[-1] ** -0.5)
    return lowering.estimate(estimator)(inputs, [rule] * len(heads))


def vertical_slash(query: torch.Tensor, key: torch.Tensor) -> SparseIndex:
    return run_estimator(VERTICAL_SLASH, query, key, VerticalSlashRule(VERTICAL, SLASH))


def block_top_k(query: torch.Tensor, key: torch.Tensor, top_k: int = TOP_K) -> SparseIndex:
    return run_estimator(BLOCK_SPARSE, query, key, BlockSparseRule(top_k, 64))


def list_pattern(query: torch.Tensor, key: torch.Tensor, *, name: str) -> SparseIndex:
    """A pattern in list form with its default parameters, by the generated kernels."""
    pattern = find_pattern(name)()
    assert isinstance(pattern, ListPattern)
    return run_estimator(pattern.estimator, query, key, pattern.rule())


def per_kv_head(query: torch.Tensor, key: torch.Tensor, *, name: str) -> SparseIndex:
    """As `list_pattern`, with one selection for the query heads of a kv head."""
    pattern = find_pattern(name)(per="kv_head")
    assert isinstance(pattern, ListPattern)
    estimate = lowering.estimate(pattern.estimator)
    heads = range(query.shape[1])
    return shared_index(
        lambda merged, own: estimate(merged, [one.rule() for one in own]),
        EstimateInputs(query, key, AttentionMask(), heads, query.shape[-1] ** -0.5),
        [pattern] * len(heads),
    )


def sample_attention(query: torch.Tensor, key: torch.Tensor) -> SparseIndex:
    return run_estimator(SAMPLE_ATTENTION, query, key, SampleAttention().rule())


def union(query: torch.Tensor, key: torch.Tensor, *, int8: bool, lines: int) -> SparseIndex:
    """The default of `union` with products and a tile that are said; the usual ones are among."""
    pattern = find_pattern("union")()
    assert isinstance(pattern, ListPattern)
    inputs = EstimateInputs(
        query, key, AttentionMask(), range(query.shape[1]), query.shape[-1] ** -0.5
    )
    rules = [pattern.rule()] * query.shape[1]
    return vertical_block_index_by(inputs, rules, int8=int8, lines=lines)


ESTIMATORS: dict[str, Estimator] = {
    "vertical slash": vertical_slash,
    "block top k": block_top_k,
    "block max": functools.partial(list_pattern, name="block_max"),
    "block top p": functools.partial(list_pattern, name="block_top_p"),
    "union": functools.partial(list_pattern, name="union"),
    "union per kv head": functools.partial(per_kv_head, name="union"),
    "x_attention": functools.partial(list_pattern, name="x_attention"),
    "flex prefill": functools.partial(list_pattern, name="flex_prefill"),
    "sample attention": sample_attention,
}


def estimation(setting: Setting, length: int) -> Iterator[Work]:
    for name, estimate in ESTIMATORS.items():
        yield (
            f"estimation/{name}/{length}",
            functools.partial(time_estimation, setting, length, estimate),
        )
    for int8 in (False, True):
        for lines in (BLOCK, 2 * BLOCK):
            name = f"union {'int8' if int8 else 'bf16'} of {lines} rows"
            estimate = functools.partial(union, int8=int8, lines=lines)
            yield (
                f"estimation/{name}/{length}",
                functools.partial(time_estimation, setting, length, estimate),
            )


def time_estimation(setting: Setting, length: int, estimate: Estimator) -> Row:
    """Estimation with index building, and the attention over what it selects."""
    query, key, value = setting.tensors(length)
    spent = milliseconds(functools.partial(estimate, query, key), setting.device)
    row = time_attention(setting, query, key, value, estimate(query, key))
    return {"ms": spent, "attention_ms": row["ms"], "share": spent / row["ms"]} | {
        key: row[key] for key in ("tflops", "index_share_of_kv")
    }


def whole(setting: Setting, length: int) -> Iterator[Work]:
    """Estimation and attention together, at the densities that are compared with dense."""
    for density in DENSITIES:
        yield (
            f"whole/block top k {density:g}/{length}",
            functools.partial(whole_op, setting, length, density),
        )


def whole_op(setting: Setting, length: int, density: float) -> Row:
    """Pooled scores, selection and attention of `density` of the causal blocks, in one go."""
    query, key, value = setting.tensors(length)
    blocks = num_query_blocks(length, 0)
    # k of the r blocks of each row r, all of the first k: k * blocks - k^2 / 2 of blocks^2 / 2.
    top_k = max(1, round(blocks * (1 - math.sqrt(1 - density))))

    def run() -> torch.Tensor:
        index = block_top_k(query, key, top_k)
        scale = query.shape[-1] ** -0.5
        return lowering.sparse_attention(
            AttentionInputs(query, key, value, AttentionMask(), scale), index
        )

    return {"ms": milliseconds(run, setting.device), "density": density, "top_k": top_k}


def capture(setting: Setting, length: int, estimate: Estimator) -> Row:
    """Estimation and attention without a host sync, then in a CUDA graph replayed on new inputs."""
    query, key, value = setting.tensors(length)

    def layer() -> torch.Tensor:
        index = estimate(query, key)
        return lowering.sparse_attention(
            AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5), index
        )

    layer()
    if setting.smoke:
        return {"skipped": "no CUDA graphs on a CPU"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for tensor in (query, key, value):
        tensor.normal_()
    graph.replay()
    difference = float((captured.float() - layer().float()).abs().max())
    spent = milliseconds(graph.replay, setting.device)
    return {"ms": spent, "difference": difference, "ok": difference == 0.0}
