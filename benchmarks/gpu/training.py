"""Forward and backward of sparse attention on a GPU: gradients against fp64, times against SDPA."""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu import rivals
from benchmarks.gpu.check import poisoned_memory
from benchmarks.gpu.clock import milliseconds
from benchmarks.gpu.inputs import computed_flops
from benchmarks.gpu.layer import Estimator, kernel_milliseconds
from benchmarks.gpu.setting import Row, Setting, Work
from mpass.lowering.index import AttentionMask, SparseIndex, join_indexes, num_query_blocks
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.lse_ops import every_key
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference import backward as reference_backward
from mpass.lowering.reference.backward import ForwardResult
from mpass.lowering.triton import LOWERING as lowering
from mpass.lowering.triton import backward
from mpass.lowering.triton.spec import Tile
from mpass.patterns.base import find_pattern

LENGTHS = (8192, 32768, 131072)

DENSITIES = (0.05, 0.2)
"""Of the causal blocks, that block top-k keeps."""

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Largest norm of a gradient's error over the norm of the truth."""

TILES = {
    "keys": (Tile(64, 8, 2), Tile(32, 4, 2), Tile(32, 8, 2), Tile(32, 8, 3), Tile(64, 4, 2)),
    "queries": (Tile(64, 8, 2), Tile(32, 4, 2), Tile(32, 4, 3), Tile(64, 4, 1)),
}
"""Tiles that are tried beside those of the table, of the gradients of keys and of queries."""

TILED_LENGTH = 32768
"""Tokens at which they are tried."""

PATTERNS = {
    "union": ["union"],
    "block top k": ["block_sparse"],
    "vertical slash": ["vertical_slash"],
    "mixed": ["union", "vertical_slash", "block_sparse", "a_shape"],
}
"""Patterns by name, that the heads of a checked layer take in turns."""

CHECKED: dict[str, tuple[str, dict[str, Any]]] = {
    "union": ("union", {}),
    "block top k": ("block top k", {}),
    "every key": ("", {}),
    "vertical slash": ("vertical slash", {}),
    "plain": ("mixed", {}),
    "window": ("mixed", {"window": 200}),
    "padding": ("mixed", {"padding": True}),
    "bidirectional": ("block top k", {"causal": False, "padding": True}),
    "all": (
        "mixed",
        {"window": 300, "padding": True, "offset": 100, "softcap": 20.0, "sinks": True},
    ),
}
"""What is checked: patterns, and words of the mask."""


def training_checks(setting: Setting) -> Iterator[Work]:
    """Gradients of every kind of index and mask at the usual size, of few at the others."""
    few = ["plain"]
    wanted: dict[torch.dtype, dict[int, list[str]]] = {
        torch.bfloat16: {
            128: list(CHECKED),
            64: ["plain", "all"],
            80: few,
            96: few,
            192: few,
            256: few,
        },
        torch.float16: {128: few},
    }
    if setting.smoke:
        wanted = {torch.float32: {32: list(CHECKED)}}
    for dtype, dims in wanted.items():
        for dim, names in dims.items():
            for name in names:
                work = functools.partial(check_gradients, setting, dtype, dim, *CHECKED[name])
                yield f"check/training {name}/{str(dtype).removeprefix('torch.')}/{dim}", work


def check_gradients(
    setting: Setting, dtype: torch.dtype, head_dim: int, patterns: str, words: dict[str, Any]
) -> Row:
    """Gradients by the kernels, twice, against fp64 over the same cells.

    patterns: a name of PATTERNS, "" for every key; words: what the mask and the scores are. Of each
    gradient the row has the norm of its error over that of the truth, and the same of the worst
    head and 64 rows (over their norm or the tensor's mean one). Inputs are fresh at each run.
    """
    seed = secrets.randbits(31)
    heads, kv_heads, length = (4, 2, 130) if setting.smoke else (8, 2, 1000)
    inputs = random_inputs(setting.device, dtype, head_dim, heads, kv_heads, length, seed, **words)
    query, mask = inputs.query, inputs.mask
    index = layer_index(inputs, PATTERNS[patterns]) if patterns else every_key(inputs)
    generator = torch.Generator(setting.device).manual_seed(seed + 1)
    shape = (*query.shape[:3], inputs.value.shape[-1])
    grad_out = torch.randn(shape, generator=generator, device=setting.device).to(dtype)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            out, lse = lowering.sparse_attention_lse(inputs, index)
            runs.append(gradients(inputs, index, ForwardResult(grad_out, out, lse)))
    sinks = inputs.sink_logits
    wide = AttentionInputs(
        *(t.double() for t in (query, inputs.key, inputs.value)),
        *(mask, inputs.scale, inputs.softcap, None if sinks is None else sinks.double()),
    )
    out, lse = reference.sparse_attention_lse(wide, index)
    result = ForwardResult(grad_out.double(), out, lse)
    truth = list(reference_backward.attention_backward(wide, index, result))
    grad_sinks = reference_backward.sink_gradient(wide, result)
    if grad_sinks is not None:
        truth.append(grad_sinks)
    row: Row = {"seed": seed, "repeats": all(map(torch.equal, *runs))}
    for name, one, right in zip(("query", "key", "value", "sinks"), runs[0], truth, strict=False):
        row[name] = float((one.double() - right).norm() / right.norm())
        if right.dim() == 4:
            row[f"{name}_block"] = worst_block(one, right)
    tolerance = TOLERANCE[dtype]
    errors = [row[name] for name in ("query", "key", "value", "sinks") if name in row]
    blocks = [row[f"{name}_block"] for name in ("query", "key", "value")]
    good = max(errors) < tolerance and max(blocks) < 4 * tolerance
    return row | {"ok": bool(good and row["repeats"])}


def worst_block(found: Tensor, truth: Tensor) -> float:
    """The largest error of a head and 64 rows, over their norm or the mean of such norms."""
    sizes = torch.stack([torch.linalg.matrix_norm(part) for part in truth.split(64, 2)])
    errors = torch.stack(
        [torch.linalg.matrix_norm(part) for part in (found.double() - truth).split(64, 2)]
    )
    return float((errors / sizes.clamp(min=sizes.mean())).nan_to_num(torch.inf, torch.inf).max())


def random_inputs(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    length: int,
    seed: int,
    *,
    window: int = 0,
    padding: bool = False,
    offset: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: bool = False,
) -> AttentionInputs:
    """Two batch rows of normal numbers under a mask."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int) -> Tensor:
        size = (2, rows, heads, head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype).transpose(1, 2)

    num_keys = length + offset
    key_mask = None
    if padding:
        key_mask = torch.ones(2, num_keys, dtype=torch.bool, device=device)
        key_mask[0, : num_keys // 3] = False
        key_mask[1, num_keys - num_keys // 5 :] = False
    logits = torch.linspace(-1, 1, heads, device=device) if sinks else None
    tensors = normal(heads, length), normal(kv_heads, num_keys), normal(kv_heads, num_keys)
    mask = AttentionMask(causal, offset, window, key_mask)
    return AttentionInputs(*tensors, mask, head_dim**-0.5, softcap, logits)


def layer_index(inputs: AttentionInputs, names: list[str]) -> SparseIndex:
    """What patterns with small budgets select, each for every n-th head."""
    small = {"vertical_slash": (100, 100), "block_sparse": (3,), "a_shape": (32, 128)}
    parts, owners = [], []
    for place, name in enumerate(names):
        pattern = find_pattern(name)(*small.get(name, ()))
        own = list(range(place, inputs.query.shape[1], len(names)))
        given = EstimateInputs(inputs.query, inputs.key, inputs.mask, own, inputs.scale)
        parts.append(type(pattern).estimate(given, [pattern] * len(own)))
        owners.append(own)
    return join_indexes(parts, owners)


def gradients(
    inputs: AttentionInputs, index: SparseIndex, result: ForwardResult
) -> tuple[Tensor, ...]:
    """What the backward op returns: of query, key, value, and of sinks if there are any."""
    assert lowering.attention_backward is not None
    found = lowering.attention_backward(inputs, index, result)
    sinks = reference_backward.sink_gradient(inputs, result)
    return found if sinks is None else (*found, sinks)


def training(setting: Setting, estimators: dict[str, Estimator]) -> Iterator[Work]:
    """Forward and backward together, the estimation in it, and dense attention's by SDPA.

    estimators: by name; "union" and "block top k" are measured, the latter at DENSITIES.
    """
    top_k = estimators["block top k"]
    for length in setting.lengths if setting.smoke else LENGTHS:
        blocks = num_query_blocks(length, 0)
        measured: dict[str, Estimator] = {"union": estimators["union"]}
        for density in DENSITIES:
            # k of the r blocks of each row r, all of the first k.
            count = max(1, round(blocks * (1 - math.sqrt(1 - density))))
            measured[f"block top k {density:g}"] = functools.partial(top_k, top_k=count)
        for name, estimate in measured.items():
            yield f"training/{name}/{length}", functools.partial(step, setting, length, estimate)
        for name, backend in rivals.BACKENDS.items():
            if not (setting.smoke and backend):
                work = functools.partial(dense_step, setting, length, backend)
                yield f"training/{name}/{length}", work
    for kind, tiles in TILES.items():
        for tile in tiles[:1] if setting.smoke else tiles:
            name = f"tile of {kind} {tile.keys} {tile.num_warps} warps {tile.num_stages} stages"
            length = setting.lengths[0] if setting.smoke else TILED_LENGTH
            work = functools.partial(step, setting, length, estimators["union"], kind, tile)
            yield f"training/{name}/{length}", work


def step(
    setting: Setting,
    length: int,
    estimate: Estimator,
    kind: str = "",
    tile: Tile | None = None,
) -> Row:
    """A layer's training step as a compiled model runs it: estimate, forward, backward.

    ms: of all three; work: the share of dense attention's; kernels: milliseconds of the backward
    pass by name; kind, tile: a tile to take instead of the table's, for gradients of these.
    """
    query, key, value = setting.tensors(length)
    inputs = AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5)
    index = estimate(query, key)
    grad_out = torch.randn_like(query)
    out, lse = lowering.sparse_attention_lse(inputs, index)
    result = ForwardResult(grad_out, out, lse)

    def whole() -> tuple[Tensor, ...]:
        index = estimate(query, key)
        out, lse = lowering.sparse_attention_lse(inputs, index)
        return gradients(inputs, index, ForwardResult(grad_out, out, lse))

    forward = functools.partial(lowering.sparse_attention_lse, inputs, index)
    back = functools.partial(gradients, inputs, index, result)
    with other_tile(kind, tile):
        row: Row = {"work": computed_flops(index, length, query.shape[-1])}
        row["work"] /= setting.shape(length).dense_flops
        row["backward_ms"] = milliseconds(back, setting.device)
        if not setting.smoke:
            row["kernels"] = kernel_milliseconds(back, 3 if row["backward_ms"] < 200 else 1)
        if tile is not None:
            return row
        row["estimation_ms"] = milliseconds(lambda: estimate(query, key), setting.device)
        row["forward_ms"] = milliseconds(forward, setting.device)
        row["ms"], row["peak_gb"] = with_memory(setting, whole)
    return row


def with_memory(setting: Setting, run: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a run, and the gigabytes of memory that were taken at most."""
    if setting.device.type != "cuda":
        return milliseconds(run, setting.device), 0.0
    torch.cuda.reset_peak_memory_stats()
    spent = milliseconds(run, setting.device)
    return spent, torch.cuda.max_memory_allocated() / 1e9


@contextlib.contextmanager
def other_tile(kind: str, tile: Tile | None) -> Iterator[None]:
    """Kernels of gradients of `kind`, "keys" or "queries", take this tile inside."""
    if tile is None:
        yield
        return
    wanted = ("query_gradients",) if kind == "queries" else ("key_gradients", "column_gradients")
    usual = backward.gradient_tile

    def chosen(target: Any, template: str, head_dim: int, value_dim: int) -> Tile:
        return tile if template in wanted else usual(target, template, head_dim, value_dim)

    with mock.patch.object(backward, "gradient_tile", chosen):
        yield


def dense_step(setting: Setting, length: int, backend: SDPBackend | None) -> Row:
    """Forward and backward of torch's own causal attention."""
    tensors = [t.requires_grad_() for t in setting.tensors(length)]
    attend = functools.partial(rivals.sdpa, *tensors, backend)
    grad_out = torch.randn_like(tensors[0])

    def whole() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(), tensors, grad_out)

    row: Row = {"forward_ms": milliseconds(attend, setting.device)}
    row["ms"], row["peak_gb"] = with_memory(setting, whole)
    return row
