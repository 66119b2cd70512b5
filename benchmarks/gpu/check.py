"""Every generated kernel against the reference on the device itself, outputs poisoned first."""

from __future__ import annotations

import dataclasses
import secrets
from typing import Any

import torch

from mpass.lowering import estimators
from mpass.lowering.device import REFERENCE
from mpass.lowering.estimators import Estimator
from mpass.lowering.index import AttentionMask, SparseIndex, join_indexes
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.lowering.reference.block_sparse import BlockSparseRule
from mpass.lowering.reference.flex_prefill import FlexPrefillRule
from mpass.lowering.reference.sample_attention import SampleAttentionRule
from mpass.lowering.reference.union import VerticalBlockRule
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.lowering.reference.x_attention import XAttentionRule
from mpass.lowering.triton import LOWERING as lowering

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest norm of the error over the norm of the truth, of any head and block of 64 queries."""

AGREEMENT = 0.97
"""Least share of the cells of a reference's selection that a generated estimator must select."""

SLASHES = [VerticalSlashRule(40, 100), VerticalSlashRule(300, 200)]
TOP_K = [BlockSparseRule(2, 64), BlockSparseRule(4, 128)]
SHARE = BlockScoresRule(0.3, None, 128, sink_blocks=1, local_blocks=1, last_blocks=1, max_blocks=12)
MASS = BlockScoresRule(None, 0.7, 64, sink_blocks=1, local_blocks=1, last_blocks=0, max_blocks=12)
UNION = VerticalBlockRule(0.7, 0.1, 100, 1, 2, 0, rows=16, pool=8, max_blocks=12, last_queries=32)
FLEX = FlexPrefillRule(0.7, 0.0, 64, 512, 128, max_blocks=12)
SAMPLED = SampleAttentionRule(0.6, 0.2, 0.1, max_window=200, max_columns=300)
GROUPS = XAttentionRule(0.7, 8, 128, 1, 1, 0, max_blocks=12)

CASES: tuple[tuple[Estimator, list[int], list[Any]], ...] = (
    (estimators.VERTICAL_SLASH, [0, 5], SLASHES),
    (estimators.BLOCK_SPARSE, [1, 4], TOP_K),
    (estimators.BLOCK_SCORES, [2, 9], [SHARE, dataclasses.replace(SHARE, block_size=64)]),
    (estimators.BLOCK_SCORES, [6, 10], [MASS, dataclasses.replace(MASS, last_blocks=1)]),
    (
        estimators.X_ATTENTION,
        [8, 11],
        [GROUPS, dataclasses.replace(GROUPS, stride=16, block_size=192)],
    ),
    (estimators.FLEX_PREFILL, [12, 15], [FLEX, dataclasses.replace(FLEX, tau=1.0)]),
    (estimators.SAMPLE_ATTENTION, [13, 14], [SAMPLED, dataclasses.replace(SAMPLED, coverage=1.0)]),
    (estimators.VERTICAL_BLOCK, [3, 7], [UNION, dataclasses.replace(UNION, columns=0)]),
)
"""Estimators with the heads that they are used for, and their rules."""

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 200},
    "padding": {"padding": True},
    "offset": {"offset": 37},
    "softcap and sinks": {"softcap": 20.0, "sinks": True},
    "bidirectional": {"causal": False},
    "all": {"window": 300, "padding": True, "offset": 100, "softcap": 20.0, "sinks": True},
}


def check_layer(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    length: int,
    window: int = 0,
    padding: bool = False,
    offset: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: bool = False,
) -> dict[str, Any]:
    """One layer of all kinds of heads: estimation and attention, each against its reference.

    Inputs are fresh at each run; the row names their seed. Estimation is compared by the sets it
    selects: rounding may swap entries of nearly equal score, so that `agreement` (the share of the
    reference's cells found, of the kind of head that finds fewest) is asked to be AGREEMENT, not 1.
    """
    seed = secrets.randbits(31)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, rows: int) -> torch.Tensor:
        size = (2, heads, rows, head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    heads, kv_heads, num_keys = 16, 2, length + offset
    query, key, value = (
        normal(heads, length),
        normal(kv_heads, num_keys),
        normal(kv_heads, num_keys),
    )
    key_mask = None
    if padding:
        key_mask = torch.ones(2, num_keys, dtype=torch.bool, device=device)
        key_mask[0, : num_keys // 3] = False
        key_mask[1, num_keys - num_keys // 5 :] = False
    mask = AttentionMask(causal, offset, window, key_mask)
    scale = head_dim**-0.5
    own, expected = [], []
    for estimator, of_heads, rules in CASES:
        inputs = EstimateInputs(query, key, mask, of_heads, scale)
        for functions, found in ((lowering, own), (REFERENCE, expected)):
            with poisoned_memory():
                found.append(functions.estimate(estimator)(inputs, rules))
    index = join_indexes(own, [of_heads for _, of_heads, _ in CASES])
    logits = torch.linspace(-1, 1, heads, device=device) if sinks else None
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": logits}
    wide = (query.double(), key.double(), value.double())
    error = 0.0
    for checked in (index, shared_rows(own[1], own[0], heads)):  # this packs heads into programs
        with poisoned_memory():
            out = lowering.sparse_attention(
                AttentionInputs(query, key, value, mask, **options), checked
            )
        truth = reference.sparse_attention(AttentionInputs(*wide, mask, **options), checked)
        error = max(error, relative_error(out, truth))
    agreement = min(
        overlap(a, b, mask, batch=2, num_queries=length, num_keys=num_keys)
        for a, b in zip(own, expected, strict=True)
    )
    good = error < TOLERANCE[dtype] and agreement >= AGREEMENT
    return {"error": error, "agreement": agreement, "seed": seed, "ok": bool(good)}


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest norm of out - truth over that of truth, of a head and 64 rows: [..., N, D].

    A difference to the largest value alone would not see a key too many in a late row, where every
    key counts little. Rows whose truth is zero must be zero.
    """
    error = 0.0
    for own, right in zip(out.double().split(64, -2), truth.double().split(64, -2), strict=True):
        difference = torch.linalg.matrix_norm(own - right)
        size = torch.linalg.matrix_norm(right)
        share = torch.where(difference > 0, difference / size.clamp(min=1e-30), difference)
        error = max(error, float(share.nan_to_num(torch.inf, torch.inf).max()))
    return error


def shared_rows(lists: SparseIndex, columns: SparseIndex, heads: int) -> SparseIndex:
    """An index of `heads` heads in which adjacent ones read one row of `lists`, in turns.

    With the columns of the same row of `columns`.
    """
    slots = [head // 2 % lists.block_count.shape[1] for head in range(heads)]
    return dataclasses.replace(
        lists,
        column_count=columns.column_count[:, slots].contiguous(),
        column_index=columns.column_index[:, slots].contiguous(),
        head_slots=tuple(slots),
    )


def overlap(
    index: SparseIndex,
    expected: SparseIndex,
    mask: AttentionMask,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> float:
    """Share of the cells that `expected` computes which `index` computes too."""
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    got = reference.computed_mask(index, mask, **sizes)
    wanted = reference.computed_mask(expected, mask, **sizes)
    return float((got & wanted).sum() / wanted.sum().clamp(min=1))


class poisoned_memory:
    """torch.empty gives NaN and the largest integers: what a kernel forgets to write shows."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before)
