"""The ops of rewritten graphs: `minference::sparse_attention` and the glue around it.

Every decision stands in an op's name or arguments, so that caches keyed by the graph are right.
Index estimation has one op per pattern; mpass.patterns registers them. Letters: B batch, H query
heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.block_mask import BlockLists, attend_as_listed, lists_agree, warn_of_lists
from mpass.lowering.define import NAMESPACE, define_op, fake_of
from mpass.lowering.density import work_share
from mpass.lowering.device import REFERENCE, Lowering
from mpass.lowering.dispatch import choose_lowering, device_lowering, reason_against
from mpass.lowering.guard import guarded
from mpass.lowering.index import AttentionMask, SparseIndex, join_indexes
from mpass.lowering.inputs import AttentionInputs, RowLosses
from mpass.lowering.meter import measure_call, rows_of_call
from mpass.lowering.recorded_call import record_call
from mpass.lowering.reference.attention import empty_output, repeat_kv
from mpass.lowering.reference.dense import dense_attention

INDEX_SCHEMA = (
    "Tensor block_count, Tensor block_index, Tensor diagonal_count, Tensor diagonal_index, "
    "Tensor column_count, Tensor column_index, int[] head_slots"
)
"""The arguments of ops that are an index."""

ATTENTION_SCHEMA = (
    f"Tensor query, Tensor key, Tensor value, {INDEX_SCHEMA}, Tensor? key_mask, Tensor? sinks, "
    "SymInt query_offset, int window, bool causal, float scale, float softcap, "
    "float dense_above, SymInt min_seq_len, int layer, int site=0"
)
"""The arguments of attention over an index."""

ARGUMENTS = 21
"""How many these are."""

Result = TypeVar("Result")

IndexTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class OverIndex:
    """A call of attention over an index; its arguments are those of ATTENTION_SCHEMA.

    most_lost: the share of a head's attention that it may lose (mpass.lowering.guard); 1 for all.
    measured: rows that the meter looks at afterwards; 0 for none.
    """

    inputs: AttentionInputs
    index: SparseIndex
    dense_above: float
    min_seq_len: int
    layer: int
    site: int
    most_lost: float = 1.0
    measured: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Attended(Generic[Result]):
    """What a call has computed.

    reason: why dense attention ran, or ""; index: what sparse attention computed; losses: what that
    loses of some rows, where somebody has looked.
    """

    lowering: Lowering
    result: Result
    reason: str
    index: SparseIndex
    losses: RowLosses | None = None


def over_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_count: Tensor,
    block_index: Tensor,
    diagonal_count: Tensor,
    diagonal_index: Tensor,
    column_count: Tensor,
    column_index: Tensor,
    head_slots: Sequence[int],
    key_mask: Tensor | None,
    sinks: Tensor | None,
    query_offset: int,
    window: int,
    causal: bool,
    scale: float,
    softcap: float,
    dense_above: float = 1.0,
    min_seq_len: int = 0,
    layer: int = -1,
    site: int = 0,
) -> OverIndex:
    """The arguments of an op, in the order of ATTENTION_SCHEMA, as lowerings take them."""
    index = SparseIndex(
        block_count,
        block_index,
        diagonal_count,
        diagonal_index,
        column_count,
        column_index,
        tuple(head_slots),
    )
    mask = AttentionMask(causal, query_offset, window, key_mask)
    inputs = AttentionInputs(query, key, value, mask, scale, softcap, sink_logits=sinks)
    return OverIndex(inputs, index, dense_above, min_seq_len, layer, site)


@define_op(
    "sparse_attention",
    f"({ATTENTION_SCHEMA}, int measured=0, float most_lost=1.0, bool int8=False, "
    "Tensor? distance_bias=None) -> Tensor",
)
def sparse_attention(*arguments: Any) -> Tensor:
    """Attention over the keys that the index selects; see lowering.reference for the meaning.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> [B, H, Nq, Dv], laid out as
    [B, Nq, H, Dv]. dense_above: run dense attention where more than this share of the work is
    selected, or where dense is faster as measured; 1.0 or more for never. On a CPU that is this
    very index; elsewhere the host would wait for it, and what an earlier call of the `site`
    selected counts (0: of no call). min_seq_len: run dense below this number of keys (where no
    guard could decide it). layer: for records only. measured: the number by which
    mpass.lowering.meter keeps what the call lost; 0 for none. most_lost: a head that would lose
    more of its attention than this share, by some rows, keeps every key (mpass.lowering.guard).
    int8: scores may be products of 8-bit numbers. distance_bias: as in AttentionInputs.
    """
    call = over_index(*arguments[:ARGUMENTS])
    given, usual = arguments[ARGUMENTS:], cast(Any, (0, 1.0, False, None))  # may be left out
    measured, most_lost, int8, bias = given + usual[len(given) :]
    if int8 or bias is not None:
        call = replace(call, inputs=replace(call.inputs, int8=int8, distance_bias=bias))
    rows = rows_of_call(call.inputs.query) if measured else 0
    done = attend(replace(call, most_lost=most_lost, measured=rows), ATTENTION)
    if rows:
        dense, losses = bool(done.reason), done.losses
        measure_call(call.inputs, done.index, done.result, measured, dense=dense, losses=losses)
    return done.result


@dataclass(frozen=True, slots=True, eq=False)
class Computation(Generic[Result]):
    """What an op computes: the attention alone, or what else an op returns with it.

    sparse, dense: by a lowering; plain: dense, by plain torch.
    """

    sparse: Callable[[Lowering, AttentionInputs, SparseIndex], Result]
    dense: Callable[[Lowering, AttentionInputs], Result]
    plain: Callable[[AttentionInputs], Result]


ATTENTION: Computation[Tensor] = Computation(
    lambda lowering, inputs, index: lowering.sparse_attention(inputs, index),
    lambda lowering, inputs: lowering.dense_attention(inputs),
    dense_attention,
)


def attend(call: OverIndex, computation: Computation[Result]) -> Attended[Result]:
    """Sparse or dense attention, recorded."""
    done = sparse_or_dense(call, computation)
    record_call(done.lowering, call.inputs, done.index, layer=call.layer, dense_reason=done.reason)
    return done


def sparse_or_dense(call: OverIndex, computation: Computation[Result]) -> Attended[Result]:
    """What was computed, by the lowering that was asked.

    Where a kernel of ours fails, whether it cannot be built or raises, plain torch computes dense
    attention: its own kernels may be what failed.
    """
    inputs, index = call.inputs, call.index
    lowering = choose_lowering(inputs)
    doing = "choosing sparse or dense attention"
    losses = None
    try:
        reason = decide_dense(
            lowering,
            inputs,
            index,
            dense_above=call.dense_above,
            min_seq_len=call.min_seq_len,
            site=call.site,
        )
        if not reason:
            found = guarded(inputs, index, call.most_lost, measured=call.measured)
            index, losses = found.index, found.losses
            if found.why and not pays(lowering, inputs, index, call.dense_above):
                reason = found.why
        doing = f"a kernel of {'dense' if reason else 'sparse'} attention ({lowering.name})"
        if reason:
            out = computation.dense(lowering, inputs)
        else:
            out = computation.sparse(lowering, inputs, index)
        if call.dense_above < 1.0:
            lowering.end_call(inputs, index, call.site)
        return Attended(lowering, out, reason, index, losses)
    except Exception as error:
        reason = contain(error, doing)
    return Attended(lowering, computation.plain(inputs), reason, call.index)


def pays(
    lowering: Lowering, inputs: AttentionInputs, index: SparseIndex, dense_above: float
) -> bool:
    """Whether an index that the host may read selects so little that sparse attention pays."""
    return not decide_dense(lowering, inputs, index, dense_above=dense_above, min_seq_len=0)


def decide_dense(
    lowering: Lowering,
    inputs: AttentionInputs,
    index: SparseIndex,
    *,
    dense_above: float,
    min_seq_len: int,
    site: int = 0,
) -> str:
    """Why dense attention runs although there is an index, in words; "" for sparse attention.

    The arguments are those of the op. The index is only read where the lowering decides by cost.
    """
    num_queries, num_keys = inputs.query.shape[2], inputs.key.shape[2]
    if num_keys < min_seq_len:
        return f"{num_keys} keys, sparse from {min_seq_len} on"
    if dense_above >= 1.0:
        return ""
    unserved = reason_against(inputs) if lowering is REFERENCE else ""
    if unserved:
        return unserved
    if not device_lowering(inputs.query.device).decides_by_cost:
        return lowering.decided(inputs, site)
    limit = min(dense_above, lowering.breakeven_density(inputs))
    share = work_share(index, inputs.mask, num_queries, num_keys, enough=limit)
    if share <= limit:
        return ""
    return f"{share:.0%} of the work or more is selected, sparse pays up to {limit:.0%}"


@fake_of("sparse_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)


@define_op(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? sinks, "
    "SymInt query_offset, int window, bool causal, float scale, float softcap) -> Tensor",
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    query_offset: int,
    window: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """Dense attention whose mask is given in words instead of cells; see lowering.dense.

    What mpass.serving.transformers_attention puts into graphs; the pass makes it sparse.
    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> [B, H, Nq, Dv].
    """
    mask = AttentionMask(causal, query_offset, window, key_mask)
    return dense_attention(
        AttentionInputs(query, key, value, mask, scale, softcap, sink_logits=sinks)
    )


@fake_of("attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)


@torch.library.custom_op(
    f"{NAMESPACE}::check_block_lists",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor? full_kv_num_blocks, Tensor? full_kv_indices, int query_block, "
    "int key_block, Tensor? key_mask, SymInt query_offset, int window, bool causal, float scale, "
    "float softcap, int layer) -> ()",
)
def check_block_lists(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor | None,
    full_kv_indices: Tensor | None,
    query_block: int,
    key_block: int,
    key_mask: Tensor | None,
    query_offset: int,
    window: int,
    causal: bool,
    scale: float,
    softcap: float,
    layer: int,
) -> None:
    """Overwrite `out` where a flex_attention's lists of blocks are not those of its mask.

    out [B, H, Nq, Dv]: sparse attention under the mask that mask_mod was proven to mean. The lists
    are tensors that each call may change, hence this check in each call. Where the host would wait
    for the answer, on a GPU, the device alone acts on it, and nobody warns. See
    lowering.block_mask.
    """
    lists = BlockLists(
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, query_block, key_block
    )
    mask = AttentionMask(causal, query_offset, window, key_mask)
    inputs = AttentionInputs(query, key, value, mask, scale, softcap)
    lowering = device_lowering(query.device)
    if not lowering.decides_by_cost:
        lowering.correct_as_listed(out, inputs, lists)
    elif not bool(lists_agree(lists, mask, query.shape[2], key.shape[2])):
        warn_of_lists(layer)
        attend_as_listed(out, inputs, lists)


@torch.library.custom_op(
    f"{NAMESPACE}::fill_rows_without_keys",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor value, Tensor key_mask) -> ()",
)
def fill_rows_without_keys(out: Tensor, value: Tensor, key_mask: Tensor) -> None:
    """Overwrite the batch rows of `out` that have no key with the mean of all values.

    out [B, H, Nq, Dv]; value [B, Hk, Nk, Dv]; key_mask: bool [B, n], n <= Nk. It is what a softmax
    gives whose scores are all the same large negative number. On a CPU a look at the key mask is
    all it costs where every batch row has a key; a GPU's host does not wait for that answer.
    """
    missing = ~key_mask.any(-1)
    if missing.device.type == "cpu" and not bool(missing.any()):
        return
    mean = value.to(torch.promote_types(value.dtype, torch.float32)).mean(2, keepdim=True)
    mean = repeat_kv(mean, out.shape[1]).to(out.dtype)
    out.copy_(torch.where(missing[:, None, None, None], mean, out))


@define_op(
    "join_indexes",
    "(Tensor[] parts, int[] head_slots, int[] heads, int[] num_heads) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    chooses=True,
)
def join(
    parts: Sequence[Tensor],
    head_slots: Sequence[int],
    heads: Sequence[int],
    num_heads: Sequence[int],
) -> IndexTensors:
    """One index of a layer from the indexes of its patterns, see lowering.index.join_indexes.

    parts: six tensors per index; head_slots, heads: per index, one after the other; num_heads: how
    many of them belong to each.
    """
    indexes, head_lists, start = [], [], 0
    for i, count in enumerate(num_heads):
        tensors = cast(IndexTensors, tuple(parts[6 * i : 6 * i + 6]))
        indexes.append(SparseIndex(*tensors, tuple(head_slots[start : start + count])))
        head_lists.append(list(heads[start : start + count]))
        start += count
    return join_indexes(indexes, head_lists).tensors()


@fake_of("join_indexes")
def _(
    parts: Sequence[Tensor],
    head_slots: Sequence[int],
    heads: Sequence[int],
    num_heads: Sequence[int],
) -> IndexTensors:
    def joined(position: int) -> Tensor:
        tensors = list(parts[position::6])
        shape = list(tensors[0].shape)
        shape[1] = sum(tensor.shape[1] for tensor in tensors)
        if position % 2:  # the entries; counts stand at even positions
            shape[-1] = max(tensor.shape[-1] for tensor in tensors)
        return tensors[0].new_empty(shape)

    return (joined(0), joined(1), joined(2), joined(3), joined(4), joined(5))
