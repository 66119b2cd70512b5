"""Attention of which something is kept over denoising steps: `minference::sparse_attention_steps`.

`options={"denoising": True}` puts this op in the place of sparse attention that is not causal. What
it does in a call says the run around it (lowering/denoising.py): the graph knows no step, so that
one graph serves all of them.

Letters: B batch, H query heads, Nq queries, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.denoising import GRAPH, RUN, DenoisingRun, Kept
from mpass.lowering.denoising_plan import StepRule
from mpass.lowering.device import Lowering
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import (
    IndexWidth,
    SparseIndex,
    empty_index,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.lse_ops import dense_attention_lse
from mpass.lowering.ops import ATTENTION_SCHEMA, OverIndex, decide_dense, over_index
from mpass.lowering.recorded_call import record_call
from mpass.lowering.reference.attention import empty_output, selected_blocks
from mpass.lowering.reference.dense import dense_attention

OUTSIDE = "outside of mpass.denoising, which keeps what is left out"
UNTOLD = "no step was told to mpass.denoising"


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Of a whole step: its output and the selected keys' [B, H, Nq, Dv], and fp32 [B, H, Nq] the
    share of each row's softmax that these have, None where nobody asked.
    """

    full: Tensor
    sparse: Tensor
    ratio: Tensor | None


def whole_step(
    lowering: Lowering, inputs: AttentionInputs, index: SparseIndex, ratio: bool
) -> Whole:
    """Attention over every key, and over the selected ones.

    Every cell is computed once: over the selected keys and over the others, whose sums are joined
    by their log-sum-exps. Single columns and sinks would count twice so: there, two passes.
    """
    if index.column_index.shape[-1] or inputs.sink_logits is not None:
        if not ratio:
            sparse = lowering.sparse_attention(inputs, index)
            return Whole(lowering.dense_attention(inputs), sparse, None)
        sparse, lse = lowering.sparse_attention_lse(inputs, index)
        full, total = dense_attention_lse(lowering, inputs)
        return Whole(full, sparse, share_of(lse, total))
    sparse, lse = lowering.sparse_attention_lse(inputs, index)
    rest, other = lowering.sparse_attention_lse(inputs, unselected(inputs, index))
    share = share_of(lse, torch.logaddexp(lse, other))
    wide = torch.lerp(rest.to(share.dtype), sparse.to(share.dtype), share[..., None])
    return Whole(wide.to(rest.dtype), sparse, share if ratio else None)


def share_of(part: Tensor, total: Tensor) -> Tensor:
    """e^part of e^total; 0 where there is nothing at all."""
    return torch.where(total > -torch.inf, (part - total).exp(), 0.0)


def unselected(inputs: AttentionInputs, index: SparseIndex) -> SparseIndex:
    """The index, in lists, of the key blocks that an index without columns leaves out."""
    query, num_keys = inputs.query, inputs.key.shape[2]
    blocks = num_key_blocks(num_keys)
    rows = num_query_blocks(query.shape[2], 0)
    places = torch.arange(rows, device=query.device)
    selected = selected_blocks(index, places, places, blocks, stop=rows)
    count = blocks - selected.sum(-1, dtype=torch.int32)
    order = torch.sort(selected.to(torch.uint8), dim=-1, stable=True).indices
    live = torch.arange(blocks, device=query.device) < count[..., None]
    batch, heads = query.shape[:2]
    none = query.new_zeros((batch, 0), dtype=torch.int32)
    return SparseIndex(
        block_count=count.expand(batch, -1, -1).to(torch.int32).contiguous(),
        block_index=torch.where(live, order, 0).to(torch.int32).contiguous(),
        diagonal_count=none,
        diagonal_index=none[..., None],
        column_count=query.new_zeros((batch, heads), dtype=torch.int32),
        column_index=query.new_zeros((batch, heads, 0), dtype=torch.int32),
        head_slots=list_slots(heads),
    )


def attend_in_run(
    run: DenoisingRun, lowering: Lowering, call: OverIndex, number: int
) -> tuple[Tensor, str, SparseIndex]:
    """The output of one call in a run, why it was whole or "", and the keys that were selected.

    number: of the site in its graph. Raises DenoisingMemoryError.
    """
    inputs, step = call.inputs, run.step
    key = run.numbered((*GRAPH.get(), number))
    if step is None:
        return lowering.dense_attention(inputs), UNTOLD, call.index
    if run.probe is not None:
        out = run.probe.attend(lowering, inputs, call.index, step, run.place(key))
        return out, whole_reason(run, step), call.index
    rule = run.rule(key, step)
    kept = run.kept.get(key)
    if kept is not None and kept.signature != signature(inputs):
        kept = run.kept.pop(key)  # other shapes: another prompt
        kept = None
    if rule.keep == "nothing":
        if rule.full:
            return lowering.dense_attention(inputs), whole_reason(run, step), call.index
        reason = dense_reason(lowering, call)
        if reason:
            return lowering.dense_attention(inputs), reason, call.index
        return lowering.sparse_attention(inputs, call.index), "", call.index
    run.needed[key] = bytes_needed(rule, inputs)
    if rule.full and not rule.kept:
        return lowering.dense_attention(inputs), whole_reason(run, step), call.index
    if rule.full or kept is None:
        run.check_memory()
        out = keep_step(run, rule, lowering, call, key, kept)
        return out, run.kept[key].dense_reason or whole_reason(run, step), call.index
    if kept.dense_reason:
        return lowering.dense_attention(inputs), kept.dense_reason, call.index
    if kept.index is None:  # the output is what is kept
        out = empty_output(inputs.query, inputs.value)
        return out.copy_(kept.at(step)), "", nothing(inputs)
    out = lowering.sparse_attention(inputs, kept.index)
    if kept.ratio is not None:
        since = rule.decay * (step - kept.tensors[-1][0])
        out *= (kept.ratio + since).clamp(max=1.0)[..., None].to(out.dtype)
    return out.add_(kept.at(step)), "", kept.index


def keep_step(
    run: DenoisingRun,
    rule: StepRule,
    lowering: Lowering,
    call: OverIndex,
    key: tuple[object, ...],
    kept: Kept | None,
) -> Tensor:
    """The output of a whole step, of which the run keeps what later steps need."""
    inputs, step = call.inputs, run.step
    assert step is not None, "somebody told it"
    now = Kept(signature(inputs))
    before = kept.tensors[-1:] if rule.order and kept is not None else []
    if rule.keep == "output":
        out = lowering.dense_attention(inputs)
        now.tensors = [*before, (step, out.clone())]
        run.kept[key] = now
        return out
    now.dense_reason = dense_reason(lowering, call)
    if now.dense_reason:
        run.kept[key] = now
        return lowering.dense_attention(inputs)
    # A slope is one of the residual of the same keys.
    same = rule.order and kept is not None and kept.index is not None
    now.index = kept.index if same and kept is not None else call.index
    assert now.index is not None
    whole = whole_step(lowering, inputs, now.index, rule.ratio)
    now.ratio = whole.ratio
    sparse = whole.sparse
    if now.ratio is not None:
        sparse = sparse * now.ratio[..., None].to(sparse.dtype)
    now.tensors = [*before, (step, whole.full - sparse)]
    run.kept[key] = now
    return whole.full


def nothing(inputs: AttentionInputs) -> SparseIndex:
    """The index of a call that computes nothing, for records."""
    query = inputs.query
    rows = num_query_blocks(query.shape[2], inputs.mask.query_offset)
    return empty_index(query, rows, IndexWidth(), list_slots(query.shape[1]))


def dense_reason(lowering: Lowering, call: OverIndex) -> str:
    """Why sparse attention is of no use in this call, or ""."""
    return decide_dense(
        lowering,
        call.inputs,
        call.index,
        dense_above=call.dense_above,
        min_seq_len=call.min_seq_len,
        site=call.site,
    )


def whole_reason(run: DenoisingRun, step: int) -> str:
    """Why a step is whole, for records."""
    return f"step {step} of {run.schedule.steps} is computed whole"


def signature(inputs: AttentionInputs) -> tuple[object, ...]:
    """What must not change while something is kept."""
    query, key, value = inputs.query, inputs.key, inputs.value
    shapes = (tuple(query.shape), tuple(key.shape), tuple(value.shape))
    return (*shapes, query.dtype, query.device)


def bytes_needed(rule: StepRule, inputs: AttentionInputs) -> int:
    """Memory that a call keeps, but for its index: known before anything is kept."""
    rows = inputs.query.shape[0] * inputs.query.shape[1] * inputs.query.shape[2]
    size = rows * inputs.value.shape[3] * inputs.query.element_size()
    return size * (1 + rule.order) + 4 * rows * rule.ratio


@define_op(
    "sparse_attention_steps",
    f"(int number, {ATTENTION_SCHEMA}) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # a CUDA graph would replay one step for all
)
def sparse_attention_steps(number: int, *arguments: Any) -> Tensor:
    """`minference::sparse_attention`, which see, in a run of `mpass.denoising`; dense elsewhere.

    number: of the site, unique in its graph. What is kept stays in the run.
    """
    call = over_index(*arguments)
    run = RUN.get()
    lowering = choose_lowering(call.inputs)
    index = call.index
    try:
        if run is None:
            out, reason = lowering.dense_attention(call.inputs), OUTSIDE
        else:
            out, reason, index = attend_in_run(run, lowering, call, number)
    except Exception as error:
        reason = contain(error, f"attention over denoising steps ({lowering.name})")
        out = dense_attention(call.inputs)
    if call.dense_above < 1.0 and not reason:
        lowering.end_call(call.inputs, index, call.site)
    record_call(lowering, call.inputs, index, layer=call.layer, dense_reason=reason)
    return out


@fake_of("sparse_attention_steps")
def _(number: int, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)
