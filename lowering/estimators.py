"""The estimators that patterns use: one record each, of its meaning, its rule and its buffers.

A lowering brings implementations of its own in a table whose keys are these records
(`mpass.lowering.device.Lowering.estimators`); plain torch serves where it has none. All functions
of one estimator have the same signature: (inputs, rules) -> SparseIndex, with one rule per head of
`inputs.heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mpass.lowering.index import IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_scores import (
    BlockScoresRule,
    block_scores_index,
    block_scores_width,
)
from mpass.lowering.reference.block_sparse import (
    BlockSparseRule,
    block_sparse_index,
    block_sparse_width,
)
from mpass.lowering.reference.flex_prefill import (
    FlexPrefillRule,
    flex_prefill_index,
    flex_prefill_width,
)
from mpass.lowering.reference.sample_attention import (
    SampleAttentionRule,
    sample_attention_index,
    sample_attention_width,
)
from mpass.lowering.reference.union import (
    VerticalBlockRule,
    vertical_block_index,
    vertical_block_width,
)
from mpass.lowering.reference.vertical_slash import (
    VerticalSlashRule,
    vertical_slash_index,
    vertical_slash_width,
)
from mpass.lowering.reference.x_attention import (
    XAttentionRule,
    x_attention_index,
    x_attention_width,
)

EstimateFunction: TypeAlias = Callable[[EstimateInputs, Sequence[Any]], SparseIndex]
"""One rule per head of the inputs -> the index of these heads."""


@dataclass(frozen=True, eq=False)
class Estimator:
    """How some patterns find the keys that matter; compared by identity.

    name: as in messages and tests.
    reference: what it means, in plain torch.
    width: the buffer sizes of its index, from the rules alone.
    rule: makes the rule of one head from named numbers; a dataclass.
    """

    name: str
    reference: EstimateFunction
    width: Callable[[Sequence[Any]], IndexWidth]
    rule: Callable[..., Any]


BLOCK_SCORES = Estimator("block_scores", block_scores_index, block_scores_width, BlockScoresRule)
"""Of block_max and block_top_p."""

BLOCK_SPARSE = Estimator("block_sparse", block_sparse_index, block_sparse_width, BlockSparseRule)

FLEX_PREFILL = Estimator("flex_prefill", flex_prefill_index, flex_prefill_width, FlexPrefillRule)

SAMPLE_ATTENTION = Estimator(
    "sample_attention", sample_attention_index, sample_attention_width, SampleAttentionRule
)

VERTICAL_BLOCK = Estimator(
    "vertical_block", vertical_block_index, vertical_block_width, VerticalBlockRule
)
"""Of the pattern that is named union."""

VERTICAL_SLASH = Estimator(
    "vertical_slash", vertical_slash_index, vertical_slash_width, VerticalSlashRule
)

X_ATTENTION = Estimator("x_attention", x_attention_index, x_attention_width, XAttentionRule)

ESTIMATORS = (
    BLOCK_SCORES,
    BLOCK_SPARSE,
    FLEX_PREFILL,
    SAMPLE_ATTENTION,
    VERTICAL_BLOCK,
    VERTICAL_SLASH,
    X_ATTENTION,
)
"""All estimators that are shipped; a package that brings a pattern may bring others."""
