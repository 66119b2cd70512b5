"""No op makes the host wait for a GPU, whatever it is asked: seen on tensors without numbers.

Device "meta" goes the way of a GPU here (tests/helpers/fake_gpu.py): Triton's lowering serves it, a
dry run takes its launches, and what reads a number, or copies to or from the host, fails.
"""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

import mpass
import mpass.serving.transformers_attention  # its op is among those that are walked
from mpass.lowering.denoising import denoising
from mpass.lowering.device import REFERENCE
from mpass.lowering.estimators import ESTIMATORS
from mpass.lowering.index import (
    AttentionMask,
    IndexWidth,
    diagonal_slots,
    empty_index,
    list_slots,
    num_query_blocks,
)
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.kv_selection import SnapKV, select_keys
from mpass.lowering.mask_forms import UNKNOWN
from mpass.lowering.recorder import record
from mpass.lowering.reference.dense import dense_attention
from mpass.lowering.reference.flex_prefill import distance_sums
from mpass.lowering.reference.selection import running_sums
from mpass.lowering.triton import LOWERING
from mpass.lowering.triton.dry_run import dry_run
from mpass.patterns.base import patterns_as_text, registered_patterns
from tests.helpers.fake_gpu import (
    ADDS_BY_ATOMICS,
    COPIES_FROM_THE_HOST,
    READS_THE_DEVICE,
    Watched,
    meta_gpu,
)
from tests.helpers.op_functions import op_functions

QUERIES, KEYS, HEADS = 700, 740, 4

KINDS = ("lse", "train", "backward", "summaries", "kv", "steps")
"""Of sparse attention that gives more than its output, or takes more."""

SNAP = astuple(SnapKV(budget=64, window=16))

MASKS = {"plain": (0, 0, False), "window, padding, offset": (40, 90, True)}
"""The offset of the first query, the window, and whether there is a key mask."""


@pytest.fixture
def device(monkeypatch):
    """Of tensors whose launches go into a dry run; a failure of an op is one of the test."""
    monkeypatch.setenv("MPASS_STRICT", "1")
    return meta_gpu(monkeypatch)


def tensors(device, queries=QUERIES, keys=KEYS):
    query = torch.empty(2, queries, HEADS, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    key = torch.empty(2, keys, 2, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    return query, key, key


def index_of(query, slots, offset=0):
    rows = num_query_blocks(query.shape[2], offset)
    return empty_index(query, rows, IndexWidth(3, 3, 70), slots)


def calls(name, device, offset, window, padded):
    """The arguments of some calls of an op."""
    query, key, value = tensors(device)
    key_mask = torch.ones(2, KEYS, dtype=torch.bool, device=device) if padded else None
    sinks = torch.ones(HEADS, device=device)
    words = (offset, window, True, 0.2)
    patterns = registered_patterns()
    if name in patterns:
        cls = patterns[name]
        for pattern in (cls(), *cls.examples()):
            fields = [[number] * 3 for number in pattern.parameters().values()]
            for dense_above, shortest in ((0.5, 0), (1.0, 10**6)):
                limits = (dense_above, shortest)
                yield (query, key, key_mask, [0, 1, 3], *words, *limits, *fields)
                if cls.bidirectional and not offset + window:
                    yield (query, key, key_mask, [0, 1, 3], 0, 0, False, 0.2, *limits, *fields)
    elif name == "sparse_attention":
        for slots in (list_slots(HEADS), diagonal_slots(HEADS), (1, -1, -2, 0)):
            index = (*index_of(query, slots, offset).tensors(), list(slots))
            for softcap, shortest in ((0.0, 0), (2.0, 0), (0.0, 10**6), (2.0, 10**6)):
                rest = (softcap, 0.5, shortest, 3)
                yield (query, key, value, *index, key_mask, sinks, *words, *rest)
                yield (query, key, value, *index, key_mask, None, *words, *rest)
                yield (query, key, value, *index, key_mask, None, *words, *rest, 5, 0, 0.4)
                yield (query, key, value, *index, key_mask, sinks, *words, *rest, 5, 9, 0.4)
    elif name == "attention":
        one = query[:, :, :1]
        yield (query, key, value, key_mask, None, *words, 0.0)
        yield (query, key, value, key_mask, sinks, *words, 2.0)
        yield (one, key, value, key_mask, None, KEYS - 1, *words[1:], 0.0)
        yield (one, key, value, None, sinks, KEYS - 1, *words[1:], 0.0)
    elif name == "join_indexes":
        parts = [index_of(query, slots) for slots in ((0, 1), (-1, -2))]
        yield ([t for part in parts for t in part.tensors()], [0, 1, -1, -2], [1, 3, 0, 2], [2, 2])
    elif name == "fill_rows_without_keys":
        yield (query, value, torch.ones(2, KEYS, dtype=torch.bool, device=device))
    elif name == "check_block_lists":
        counts = torch.ones(1, 1, 6, dtype=torch.int32, device=device)
        entries = torch.zeros(1, 1, 6, 6, dtype=torch.int32, device=device)
        for full in ((None, None), (counts, entries)):
            for softcap in (0.0, 2.0):
                lists = (counts, entries, *full, 128, 128)
                yield (query, query, key, value, *lists, key_mask, *words, softcap, 3)
    elif name in ("read_mask", "masked_attention"):
        yield from calls_under_a_mask(name, query, key, value, sinks)
    elif name == "tile_order":
        yield (query, [25, 27], [8, 8], 5, QUERIES - 680)
        yield (query, [3, 13, 17], [4, 4, 4], 30, 7)
        yield (query[:, :, :680], [], [8, 8], -1, 0)
    elif name == "with_key_bias":
        for bias in (torch.empty(HEADS, 1, KEYS, device=device), torch.empty(KEYS, device=device)):
            for shifted in (False, True):
                yield (query, key, bias, 1.0, 0.2, shifted)
    elif name in ("attention_lse", *(f"sparse_attention_{kind}" for kind in KINDS)):
        yield from calls_with_lse(name, device, offset, window, key_mask)
    elif name in ("linear_in_fp32", "linear_in_half"):
        yield (query[0, 0], query[0, 0], None)
    elif name in ("quantize_rows", "multiply_rows"):  # linear layers in 8 bits: on CPUs only
        rows = torch.empty(3, 128, device=device)
        levels = torch.empty(3, 128, dtype=torch.uint8, device=device)
        yield (rows,) if name == "quantize_rows" else (levels, rows)
    else:
        raise AssertionError(f"{name} has no case here: can it make the host wait?")


def calls_with_lse(name, device, offset, window, key_mask):
    """Of the ops whose attention comes with its log-sum-exps."""
    query, key, value = tensors(device)
    sinks = torch.ones(HEADS, device=device)
    causal = name not in ("sparse_attention_summaries", "sparse_attention_steps")
    words = (offset, window, True, 0.2) if causal else (0, 0, False, 0.2)
    if name == "attention_lse":
        yield (query, key, value, key_mask, sinks, *words, 2.0)
        yield (query, key, value, key_mask, None, *words, 0.0)
        return
    for slots in (list_slots(HEADS), diagonal_slots(HEADS), (1, -1, -2, 0)):
        index = (*index_of(query, slots, words[0]).tensors(), list(slots))
        for softcap, shortest in ((0.0, 0), (2.0, 0), (0.0, 10**6)):
            given = (query, key, value, *index, key_mask, sinks, *words, softcap)
            if name == "sparse_attention_backward":
                out, lse = torch.empty_like(query), query[..., 0].float()
                yield (out, out, lse, torch.tensor([shortest > 0]), *given)
            else:
                first = {"sparse_attention_summaries": (16,), "sparse_attention_kv": SNAP}
                first["sparse_attention_steps"] = (1,)
                yield (*first.get(name, ()), *given, 0.5, shortest, 3)


def calls_under_a_mask(name, query, key, value, sinks):
    """Of the ops that read a mask on CPUs."""
    for dtype in (torch.bool, torch.bfloat16):
        mask = torch.zeros(2, 1, QUERIES, KEYS, dtype=dtype, device=query.device)
        if name == "read_mask":
            yield (mask,)
            continue
        read = op_functions()["read_mask"](mask)
        text = patterns_as_text([registered_patterns()["a_shape"]()] * HEADS)
        for softcap, written_out in ((0.0, False), (2.0, True)):
            rest = (text, 0.2, softcap, written_out, 0.5, 0, 3)
            yield (query, key, value, mask, *read, None if written_out else sinks, *rest)


ON_CPUS_ONLY = {
    *("dynamic_mask_attention", "dynamic_mask_backward", "fill_rows_before_keys"),
    "similar_order",
}
"""The first look for ties between numbers: on a GPU such attention stays dense, with this reason.
Tokens that would be sorted by what they hold keep their order there."""

OPS = sorted(set(op_functions()) - ON_CPUS_ONLY)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", OPS)
def test_no_op_reads_the_device(name, mask, device):
    arguments = list(calls(name, device, *mask))
    assert arguments
    implementation = op_functions()[name]
    # Which way the forward pass ran lies on the CPU already.
    backward = name == "sparse_attention_backward"
    forbidden = ADDS_BY_ATOMICS if backward else set()
    forbidden = forbidden | READS_THE_DEVICE | COPIES_FROM_THE_HOST
    for given in arguments:
        watched = Watched(forbidden, host_reads=backward)
        with record(), watched, dry_run(), select_keys(), denoising(9, full=1, every=9) as run:
            for _ in run.over(range(2 if name == "sparse_attention_steps" else 1)):
                implementation(*given)


@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("patterns", ["union", ["dense", "a_shape", "union", "vertical_slash"]])
def test_attend_reads_no_tensor_on_the_way_to_its_ops(patterns, queries, device):
    query, key, value = tensors(device, queries)
    key_mask = torch.ones(2, KEYS, dtype=torch.bool, device=device)
    given = {"sinks": torch.ones(HEADS, device=device), "softcap": 2.0, "key_mask": key_mask}
    with Watched():
        for words in ({}, given):
            out = mpass.attend(query, key, value, patterns=patterns, query_offset=9, **words)
    assert out.shape == (2, HEADS, queries, 64)


def test_a_mask_that_only_running_tells_is_not_read_there(device):
    mask = torch.zeros(2, 1, QUERIES, KEYS, dtype=torch.bool, device=device)
    with Watched():
        form, *_ = op_functions()["read_mask"](mask)
    assert int(form[0]) == UNKNOWN


@pytest.mark.parametrize("shape", [(1, 3000, 2999, 0), (3000, 3000, 0, 512), (90, 3000, 2910, 7)])
def test_dense_attention_reads_no_position(shape):
    queries, keys, offset, window = shape
    query, key, value = (t.float() for t in tensors(torch.device("cpu"), queries, keys))
    mask = AttentionMask(True, offset, window)
    with Watched(READS_THE_DEVICE):
        dense_attention(AttentionInputs(query, key, value, mask, 0.2))


@pytest.mark.parametrize("lowering", [LOWERING, REFERENCE], ids=lambda own: own.name)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda own: own.name)
def test_no_estimate_depends_on_the_order_of_atomics(estimator, lowering, device):
    query, key, _ = tensors(device)
    key_mask = torch.ones(2, KEYS, dtype=torch.bool, device=device)
    cls = next(
        own
        for own in registered_patterns().values()
        if getattr(own, "estimator", None) is estimator
    )
    for mask in (AttentionMask(), AttentionMask(True, 40, 90, key_mask)):
        for pattern in cls.examples():
            given = EstimateInputs(query, key, mask, [0, 1, 3], 0.2)
            with Watched(ADDS_BY_ATOMICS), dry_run():
                lowering.estimate(estimator)(given, [pattern.rule()] * 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_running_sums_are_those_of_each_row(rows):
    values = torch.rand(rows, 1, 700, generator=torch.Generator().manual_seed(0))
    assert torch.equal(running_sums(values), values.cumsum(-1))


def test_sums_per_distance_are_those_of_the_pairs():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 9, 40, generator=generator).tril(31)
    positions = torch.arange(31, 40).expand(2, -1)
    distance = positions[..., None] - torch.arange(40)
    expected = torch.zeros(2, 40, dtype=torch.float64)
    expected.scatter_add_(1, distance.clamp(0).flatten(1), weights.double().flatten(1))
    found = distance_sums(weights, positions)
    assert torch.equal(found, distance_sums(weights, positions))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    # A row that is not there has no weight, wherever it is said to stand.
    nobody = torch.cat([weights, torch.zeros(2, 1, 40)], 1), torch.full((2, 1), -1)
    assert torch.equal(distance_sums(nobody[0], torch.cat([positions, nobody[1]], 1)), found)
