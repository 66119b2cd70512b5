"""What attention and its estimators are given: one record each, for every lowering and pattern.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mpass.lowering.distance_bias import of_heads
from mpass.lowering.index import AttentionMask, first_query_block, num_query_blocks


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """What one attention reads.

    query: [B, H, Nq, D].
    key: [B, Hk, Nk, D]; head h reads kv head h // (H // Hk).
    value: [B, Hk, Nk, Dv].
    mask: which keys a query may see before any sparsity.
    scale: factor of the scores.
    softcap: scores become softcap * tanh(s / softcap) if it is above 0.
    sink_logits: float [H], one more logit per head that takes probability and has no value.
    int8: scores may be products of numbers that are rounded to 8 bits (docs/int8_attention.md).
    distance_bias: [H or 1, Nq + Nk - 1 or more], added to the scaled scores by the distance of key
    and query, as mpass.lowering.distance_bias reads it; before a softcap.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask
    scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    int8: bool = False
    distance_bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """What an index loses of some query rows, and what their outputs should be.

    rows: which of the queries, int64 [R], ascending; counted: bool [B, R], False for padding and
    for rows that see nothing; lost: the share of softmax mass on keys that the index leaves out,
    fp32 [B, H, R], 0 where a row does not count; exact: outputs of dense attention, fp32 (fp64 for
    inputs of fp64) [B, H, R, Dv], or None.
    """

    rows: Tensor
    counted: Tensor
    lost: Tensor
    exact: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class EstimateInputs:
    """What an estimator reads to decide which keys some heads look at.

    query: [B, H, Nq, D], all query heads of the layer.
    key: [B, Hk, Nk, D]; head h reads kv head h // (H // Hk).
    mask: which keys a query may see before any sparsity.
    heads: the query heads that the index is for, in the order of its rows.
    scale: factor of the scores.
    distance_bias: as in AttentionInputs.
    """

    query: Tensor
    key: Tensor
    mask: AttentionMask
    heads: Sequence[int]
    scale: float
    distance_bias: Tensor | None = None

    @property
    def batch(self) -> int:
        """B."""
        return self.query.shape[0]

    @property
    def num_queries(self) -> int:
        """Nq."""
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        """Nk."""
        return self.key.shape[2]

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def first_block(self) -> int:
        """The block of the absolute grid that holds the first query."""
        return first_query_block(self.mask.query_offset)

    @property
    def num_blocks(self) -> int:
        """Blocks of the absolute grid that hold the queries."""
        return num_query_blocks(self.num_queries, self.mask.query_offset)

    def attention(self) -> AttentionInputs:
        """The attention of these queries and keys, the keys in the values' place."""
        return AttentionInputs(
            *(self.query, self.key, self.key, self.mask, self.scale),
            distance_bias=self.distance_bias,
        )

    def bias_lines(self) -> list[Tensor | None]:
        """The bias by distance of each of `heads`, fp32 [L]; None where there is none."""
        line = self.distance_bias
        return of_heads(None if line is None else line.float(), self.heads)
