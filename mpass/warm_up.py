"""Kernels of a graph are built in the background while the inner compiler works on the rest.

On CPUs they are built by using them, on one block of zeros: whatever a pattern's estimator and the
attention need is then in memory or being compiled when the first prompt arrives, and several
libraries are compiled at once. Where the code of a kernel depends on more than that, on GPUs, each
layer is run on fake tensors of the sizes of this call (`Lowering.prepare`), and all that it would
launch is built. A prompt that comes earlier waits for the kernel that it needs.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mpass.graph.nodes import example, number_now
from mpass.lowering.activity import activity
from mpass.lowering.device import Lowering
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    join_indexes,
    whole_index,
)
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.lse_ops import every_key
from mpass.lowering.reference.backward import ForwardResult
from mpass.patterns.base import Pattern, shared_slots
from mpass.plan import AttentionPlan

log = logging.getLogger(__name__)


def start_kernels(plans: Sequence[AttentionPlan]) -> list[threading.Thread]:
    """Start a thread per kernel that the planned sites need and that takes long to build, once.

    Returns the threads; nothing has to wait for them. What goes wrong in one goes wrong again, and
    is told, where the kernel is used.
    """
    threads: dict[threading.Thread, None] = {}
    foreseen: set[FakeLayer] = set()
    for plan in plans:
        site = plan.site
        query, value = example(site.query), example(site.value)
        lowering = device_lowering(query.device)
        unserved = lowering.serves(site.inputs())
        if site.kept is not None or not lowering.builds_ahead or unserved:
            continue
        if lowering.prepare is not None:
            threads |= dict.fromkeys(start_foreseen(lowering, plan, foreseen))
            continue
        dtype, head_dim, value_dim = site.compute_dtype, int(query.shape[-1]), int(value.shape[-1])
        sizes = (dtype, head_dim, value_dim, site.softcap, site.distance_bias is not None)
        threads[start_attention(lowering, *sizes, int8=plan.int8)] = None
        if plan.training:
            threads[start_training(lowering, *sizes)] = None
        if plan.measured or plan.most_lost < 1.0:
            threads[start_row_losses(lowering, *sizes)] = None
        for cls in dict.fromkeys(map(type, plan.patterns)):
            threads[start_estimator(lowering, cls, dtype, head_dim, sizes[-1])] = None
    return list(threads)


def start_foreseen(
    lowering: Lowering, plan: AttentionPlan, foreseen: set[FakeLayer]
) -> list[threading.Thread]:
    """A thread for each thing that a layer will need, if no layer of `foreseen` is the same."""
    assert lowering.prepare is not None
    try:
        layer = fake_layer(plan)
        if layer in foreseen or layer.key.shape[2] < number_now(plan.min_seq_len):
            return []
        foreseen.add(layer)
        builds = lowering.prepare(functools.partial(run_layer, lowering, layer))
    except Exception as error:  # the op that needs it tells it, with its traceback
        log.debug("foreseeing the kernels of %s: %s", plan.site.path, error)
        return []
    return [start(build.run, build.name) for build in builds]


@dataclass(frozen=True)
class FakeTensorLike:
    """All that a launcher sees of a tensor: its sizes now, strides, place in memory and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """A tensor like this; under FakeTensorMode it takes no memory."""
        steps = zip(self.shape, self.stride, strict=True)
        size = self.offset + 1 + sum((size - 1) * step for size, step in steps)
        memory = torch.empty(size, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class FakeLayer:
    """One layer as its launchers will see it; fields as of AttentionInputs and AttentionMask.

    training: whether gradients are computed as well.
    """

    patterns: tuple[Pattern, ...]
    query: FakeTensorLike
    key: FakeTensorLike
    value: FakeTensorLike
    key_mask: FakeTensorLike | None
    sinks: FakeTensorLike | None
    causal: bool
    query_offset: int
    window: int
    scale: float
    softcap: float
    training: bool = False
    distance_bias: FakeTensorLike | None = None


def fake_layer(plan: AttentionPlan) -> FakeLayer:
    """What stands in the graph for a site, with sizes as in the call that is compiled."""
    site, mask = plan.site, plan.site.mask
    bias = site.distance_bias
    assert mask is not None and not isinstance(mask.query_offset, fx.Node)
    dtype = site.compute_dtype
    query = tensor_like(example(site.query), dtype)
    key, value = (tensor_like(example(node), dtype) for node in (site.key, site.value))
    key_mask = None if mask.key_mask is None else tensor_like(example(mask.key_mask))
    if key_mask is not None and key_mask.shape[0] != query.shape[0]:
        key_mask = replace(
            key_mask,
            shape=(query.shape[0], *key_mask.shape[1:]),
            stride=(0, *key_mask.stride[1:]),
        )
    if mask.valid_keys is not None:
        kept = number_now(mask.valid_keys)
        key, value = (replace(t, shape=(*t.shape[:2], kept, t.shape[3])) for t in (key, value))
        if key_mask is not None:
            key_mask = replace(key_mask, shape=(key_mask.shape[0], kept))
    if plan.grid is not None:  # tokens in another order are copies
        query, key, value = map(contiguous, (query, key, value))
        key_mask = None if key_mask is None else contiguous(key_mask)
    return FakeLayer(
        patterns=plan.patterns,
        query=query,
        key=key,
        value=value,
        key_mask=key_mask,
        sinks=None if site.sinks is None else tensor_like(example(site.sinks)),
        causal=mask.causal,
        query_offset=number_now(mask.query_offset),
        window=mask.window,
        scale=site.scale,
        softcap=site.softcap,
        training=plan.training,
        distance_bias=None if bias is None else tensor_like(example(bias)),
    )


def contiguous(tensor: FakeTensorLike) -> FakeTensorLike:
    """What index_select gives of a tensor."""
    steps = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
    return replace(tensor, stride=tuple(steps), offset=0)


def tensor_like(tensor: Tensor, dtype: torch.dtype | None = None) -> FakeTensorLike:
    """What is seen of a fake tensor, without a guard on its sizes."""
    return FakeTensorLike(
        shape=tuple(map(number_now, tensor.shape)),
        stride=tuple(map(number_now, tensor.stride())),
        offset=number_now(tensor.storage_offset()),
        dtype=dtype or tensor.dtype,
        device=tensor.device,
    )


def run_layer(lowering: Lowering, layer: FakeLayer) -> None:
    """The estimators and the attention of a layer, on fake tensors."""
    with FakeTensorMode(), torch.no_grad():
        query, key, value = layer.query.make(), layer.key.make(), layer.value.make()
        key_mask = None if layer.key_mask is None else layer.key_mask.make()
        mask = AttentionMask(layer.causal, layer.query_offset, layer.window, key_mask)
        bias = None if layer.distance_bias is None else layer.distance_bias.make()
        groups: dict[type[Pattern], list[int]] = {}
        for head, pattern in enumerate(layer.patterns):
            groups.setdefault(type(pattern), []).append(head)
        parts = [
            cls.estimate(
                EstimateInputs(query, key, mask, heads, layer.scale, bias),
                [layer.patterns[head] for head in heads],
            )
            for cls, heads in groups.items()
        ]
        index = parts[0] if len(parts) == 1 else join_indexes(parts, list(groups.values()))
        slots = shared_slots(layer.patterns, index.head_slots)
        sinks = None if layer.sinks is None else layer.sinks.make()
        words = (mask, layer.scale, layer.softcap, sinks)
        inputs = AttentionInputs(query, key, value, *words, distance_bias=bias)
        index = replace(index, head_slots=slots)
        if layer.training:
            train_layer(lowering, inputs, index)
        else:
            lowering.sparse_attention(inputs, index)


def train_layer(lowering: Lowering, inputs: AttentionInputs, index: SparseIndex) -> None:
    """Attention and its gradients, over the chosen keys and over every key: a call decides."""
    for own in (index, every_key(inputs)):
        out, lse = lowering.sparse_attention_lse(inputs, own)
        if lowering.attention_backward is not None:
            lowering.attention_backward(inputs, own, ForwardResult(out, out, lse))


def one_block(
    lowering: Lowering,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float,
    biased: bool = False,
) -> tuple[AttentionInputs, SparseIndex]:
    """One head and one block of zeros, query and key [1, 1, BLOCK, head_dim], and all its keys.

    biased: whether there is a bias by distance.
    """
    query = torch.zeros(1, 1, BLOCK, head_dim, dtype=dtype, device=lowering.device)
    value = torch.zeros(1, 1, BLOCK, value_dim, dtype=dtype, device=lowering.device)
    index = whole_index(query, 1, IndexWidth(), diagonal_slots(1))
    bias = zero_bias(lowering) if biased else None
    sizes = (query, query, value, AttentionMask(), 1.0, softcap)
    return AttentionInputs(*sizes, distance_bias=bias), index


def zero_bias(lowering: Lowering) -> Tensor:
    """A bias by distance of nothing, of one block."""
    return torch.zeros(1, 2 * BLOCK - 1, device=lowering.device)


@functools.cache
def start_attention(
    lowering: Lowering,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float,
    biased: bool = False,
    int8: bool = False,
) -> threading.Thread:
    """One block of sparse attention."""

    def run() -> None:
        inputs, index = one_block(lowering, dtype, head_dim, value_dim, softcap, biased)
        lowering.sparse_attention(replace(inputs, int8=int8), index)

    bits = (", 8 bits" if int8 else "") + (", biased" if biased else "")
    return start(run, f"attention, {dtype}, D={head_dim}, DV={value_dim}{bits}")


@functools.cache
def start_row_losses(
    lowering: Lowering,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float,
    biased: bool = False,
) -> threading.Thread:
    """What one block of queries loses."""

    def run() -> None:
        inputs, index = one_block(lowering, dtype, head_dim, value_dim, softcap, biased)
        lowering.row_losses(inputs, index, 1, True)

    return start(run, f"losses, {dtype}, D={head_dim}, DV={value_dim}")


@functools.cache
def start_training(
    lowering: Lowering,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float,
    biased: bool = False,
) -> threading.Thread:
    """One block of attention and its gradients."""

    def run() -> None:
        train_layer(lowering, *one_block(lowering, dtype, head_dim, value_dim, softcap, biased))

    return start(run, f"gradients, {dtype}, D={head_dim}, DV={value_dim}")


@functools.cache
def start_estimator(
    lowering: Lowering, cls: type[Pattern], dtype: torch.dtype, head_dim: int, biased: bool = False
) -> threading.Thread:
    """One block of a pattern's estimator, with the default parameters."""

    def run() -> None:
        query = torch.zeros(1, 1, BLOCK, head_dim, dtype=dtype, device=lowering.device)
        bias = zero_bias(lowering) if biased else None
        cls.estimate(EstimateInputs(query, query, AttentionMask(), [0], 1.0, bias), [cls()])

    return start(run, f"{cls.name}, {dtype}, D={head_dim}")


def start(run: Callable[[], None], name: str) -> threading.Thread:
    """Run it in a thread that the process does not wait for."""
    ticket = activity().expect(name)

    def guarded() -> None:
        try:
            with activity().build(name, ticket), torch.no_grad():
                run()
        except Exception as error:  # the op that needs the kernel tells it, with its traceback
            log.debug("building %s in the background: %s", name, error)

    thread = threading.Thread(target=guarded, name=f"mpass: {name}", daemon=True)
    thread.start()
    return thread
