"""One attention found in a graph: what it reads, where it stands, and what its mask means.

Nothing here edits a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mpass.graph.nodes import example, head_count, number_now, shape_of
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs

Length = int | torch.SymInt


@dataclass(frozen=True)
class MaskMeaning:
    """What an attention's mask was proven to mean; `None` for a site's `mask` means unproven.

    Query row i stands at position `query_offset + i`; key j is visible iff all of these hold:
    causal: `j <= position`; window > 0: `position - j < window`, and `j - position < window` where
    it is not causal; key_mask: its entry [b, j] is true; valid_keys: `j < valid_keys`.
    mean_of_hidden: a batch row whose key_mask is all false is the mean of all values, not zeros.

    proof: the argument in words, one line per conjunct, for the report.
    """

    causal: bool
    query_offset: Length | fx.Node = 0
    window: int = 0
    key_mask: fx.Node | None = None
    valid_keys: Length | None = None
    mean_of_hidden: bool = False
    proof: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListedBlocks:
    """Nodes of a BlockMask's lists, to be checked against the mask in every call.

    As in mpass.lowering.block_mask.BlockLists; query_block, key_block: tokens in a block.
    """

    kv_num_blocks: fx.Node
    kv_indices: fx.Node
    full_kv_num_blocks: fx.Node | None
    full_kv_indices: fx.Node | None
    query_block: int
    key_block: int


@dataclass(frozen=True)
class KeptKeys:
    """What a mask keeps of each row: of the keys that may be seen the `keep` with the best numbers.

    The numbers are those of the bias per key. hidden: the number in the place of hidden ones.
    """

    keep: int
    hidden: float


@dataclass(frozen=True)
class HiddenAhead:
    """How causality hides keys ahead of a query by a finite number, beside a bias per key.

    how: one of the words of lowering/rows_before_keys.py.
    """

    number: float
    how: str


@dataclass(frozen=True)
class AttentionSite:
    """One matched attention. Nodes are those of the captured graph.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] are the nodes before any
    repetition of kv heads; output is the node whose uses the rewritten attention takes over, and
    `output_transposed` tells that it is [B, Nq, H, Dv] instead of [B, H, Nq, Dv], and
    `output_folded` that it is [.., Nq, Dv] with the elements of [B, H, Nq, Dv] in order.
    mask: what the mask means, or None with `unproven` telling why.
    spelling: how the attention is written, by a name of mpass.match.spellings.
    dense_reason: why the site must stay dense whatever the mask (dropout, weights returned, ...).
    listed: flex_attention's lists of blocks, if they may say something else than the mask.
    mask_tensor: the node of an unproven mask [.., Nq, Nk] that can be read at run time: bool, or
    added to the scores last. Nothing is claimed of it.
    dtype: what the products are computed in where autocast narrows them; None: the query's.
    key_bias: the node of numbers that are added to the scores of each key, the same in every row:
    [B or 1, H or 1, 1, Nk], or with fewer dimensions as lowering/key_bias.py reads them; times
    bias_factor. None for none.
    distance_bias: the node of a bias by distance, [H or 1, Nq + Nk - 1], as
    lowering/distance_bias.py reads it. None for none.
    kept: which keys each query keeps of those that the mask lets it see; None for all.
    ahead: what keys ahead of a query get, where that matters: rows whose bias hides every key that
    they see are then computed as eager attention does.
    rows: how many queries there are, where it is not known that the query is [B, H, Nq, D].
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: MaskMeaning | None
    spelling: str = ""
    path: str = ""
    layer: int = -1
    softcap: float = 0.0
    sinks: fx.Node | None = None
    output_transposed: bool = False
    output_folded: bool = False
    unproven: str = ""
    dense_reason: str = ""
    source: str = ""
    listed: ListedBlocks | None = None
    mask_tensor: fx.Node | None = None
    dtype: torch.dtype | None = None
    key_bias: fx.Node | None = None
    bias_factor: float = 1.0
    distance_bias: fx.Node | None = None
    kept: KeptKeys | None = None
    ahead: HiddenAhead | None = None
    rows: Length | None = None

    @property
    def read_mask(self) -> fx.Node | None:
        """The mask that decides at run time: only where no meaning of it is proven."""
        return self.mask_tensor if self.mask is None else None

    @property
    def is_two_sided(self) -> bool:
        """Whether every query sees every key but padding, as in diffusion transformers."""
        mask = self.mask
        return mask is not None and not mask.causal and not mask.window

    @property
    def feeds_a_cache(self) -> bool:
        """Whether the keys may be those of a cache that can be cut: causal, of all positions."""
        mask = self.mask
        own = mask is not None and mask.causal and not mask.window and self.kept is None
        return own and self.layer >= 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """What query, key and value are in when they are multiplied: autocast may narrow them."""
        return self.dtype or example(self.query).dtype

    def inputs(self) -> AttentionInputs:
        """What a lowering is asked about it: dtypes and sizes, and whether there is a bias."""
        query, key, value = (example(node) for node in (self.query, self.key, self.value))
        bias = None if self.distance_bias is None else example(self.distance_bias)
        words = (AttentionMask(), 1.0, self.softcap)
        return AttentionInputs(query, key, value, *words, distance_bias=bias)

    @property
    def num_heads(self) -> int:
        return head_count(self.query)

    @property
    def num_kv_heads(self) -> int:
        return head_count(self.key)

    @property
    def head_dim(self) -> int:
        return number_now(shape_of(self.query)[-1])
