"""The ops of rewritten graphs: registered as torch wants them, and joined across patterns."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.lowering import density
from mpass.lowering.index import AttentionMask, join_indexes, num_query_blocks
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import head_slots, index_op, registered_patterns
from tests.helpers.rotation import part_of_today
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention


def estimate(pattern, query, key, heads, mask=None):
    mask = mask or AttentionMask()
    cls = type(pattern)
    return cls.estimate(EstimateInputs(query, key, mask, heads, 0.2), [pattern] * len(heads))


NAMES = sorted(registered_patterns())
ESTIMATIONS = [(name, torch.float32) for name in NAMES]
ESTIMATIONS += part_of_today([(name, torch.bfloat16) for name in NAMES], share=4)


@pytest.mark.parametrize(("name", "dtype"), ESTIMATIONS, ids=str)
def test_estimation_op_passes_opcheck(name, dtype):
    cls = registered_patterns()[name]
    query, key, _ = random_attention(num_queries=130, dtype=dtype)
    parameters = [[value] * 2 for value in cls().parameters().values()]
    arguments = (query, key, None, [0, 2], 0, 0, True, 0.2, 1.0, 0, *parameters)
    torch.library.opcheck(index_op(cls), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_attention_op_passes_opcheck(dtype):
    query, key, value = random_attention(num_queries=130, value_dim=16, dtype=dtype)
    index = estimate(mpass.VerticalSlash(4, 8), query, key, range(4))
    rest = (list(index.head_slots), None, None, 0, 0, True, 0.2, 0.0, 1.0, 0, 3)
    op = torch.ops.minference.sparse_attention.default
    torch.library.opcheck(op, (query, key, value, *index.tensors(), *rest))


def test_join_op_passes_opcheck():
    query, key, _ = random_attention(num_queries=130)
    parts = [
        estimate(mpass.BlockSparse(1), query, key, [1, 3]),
        estimate(mpass.AShape(3, 9), query, key, [0, 2]),
    ]
    tensors = [tensor for part in parts for tensor in part.tensors()]
    arguments = (tensors, [0, 1, -1, -2], [1, 3, 0, 2], [2, 2])
    torch.library.opcheck(torch.ops.minference.join_indexes.default, arguments)


def test_mixed_patterns_in_one_call_equal_each_alone():
    query, key, value = random_attention(heads=6, num_queries=400)
    mask = AttentionMask()
    patterns = [mpass.BlockSparse(2), mpass.AShape(3, 70), mpass.Dense()]
    heads = [[4, 0], [1, 5], [3, 2]]
    parts = [estimate(p, query, key, h) for p, h in zip(patterns, heads, strict=True)]
    out = reference.sparse_attention(
        AttentionInputs(query, key, value, mask, 0.2), join_indexes(parts, heads)
    )
    for pattern, group in zip(patterns, heads, strict=True):
        alone = mpass.sparse_attention(
            query, key, value, pattern=pattern, scale=0.2, enable_gqa=True
        )
        assert torch.allclose(out[:, group], alone[:, group], atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("pattern", [mpass.BlockSparse(3), mpass.VerticalSlash(40, 1)], ids=str)
@pytest.mark.parametrize("offset", [0, 37, 128])
def test_density_in_closed_form_equals_counting(pattern, offset):
    query, key, _ = random_attention(num_queries=333, num_keys=333 + offset)
    mask = AttentionMask(query_offset=offset)
    index = estimate(pattern, query, key, range(4), mask)
    sizes = {"batch": 1, "num_queries": 333, "num_keys": 333 + offset}
    counted = reference.density(index, mask, **sizes)
    assert torch.equal(density.density(index, mask, **sizes), counted)
    share = density.work_share(index, mask, 333, 333 + offset)
    assert float(counted.mean()) * 0.8 < share < float(counted.mean()) * 1.35


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize(
    ("pattern", "counts"), [(mpass.Dense(), False), (mpass.AShape(1, 9), True)]
)
def test_density_of_windows_is_counted_only_where_something_is_left_out(
    pattern, counts, window, monkeypatch
):
    query, key, _ = random_attention(num_queries=333)
    mask = AttentionMask(window=window)
    index = estimate(pattern, query, key, range(4), mask)
    sizes = {"batch": 1, "num_queries": 333, "num_keys": 333}
    counted = reference.density(index, mask, **sizes)
    calls = []
    count = reference.density
    monkeypatch.setattr(
        reference, "density", lambda *a, **options: calls.append(1) or count(*a, **options)
    )
    assert torch.equal(density.density(index, mask, **sizes), counted)
    assert bool(calls) == (counts and window > 0)


def test_op_runs_dense_above_the_threshold_and_says_so():
    query, key, value = random_attention(num_queries=256)
    index = estimate(mpass.BlockSparse(4), query, key, range(4))
    scalars = (list(index.head_slots), None, None, 0, 0, True, 0.2, 0.0)
    op = torch.ops.minference.sparse_attention
    with record() as log:
        dense = op(query, key, value, *index.tensors(), *scalars, 0.6, 0, 7)
        sparse = op(query, key, value, *index.tensors(), *scalars, 1.0, 0, 7)
        short = op(query, key, value, *index.tensors(), *scalars, 1.0, 300, 7)
    assert [call.lowering == "dense" for call in log.calls] == [True, False, True]
    assert all(call.layer == 7 and call.num_keys == 256 for call in log.calls)
    assert (log.calls[0].density == 1).all()
    cells = torch.ones(256, 256, dtype=torch.bool).tril().expand(1, 4, -1, -1)
    truth = dense_attention(query, key, value, cells, 0.2)
    for out in (dense, sparse, short):
        assert (out - truth).abs().max() < TOLERANCE[torch.float32]
        assert out.transpose(1, 2).is_contiguous()


def test_index_of_a_pattern_has_the_sizes_of_its_fake():
    query, key, _ = random_attention(num_queries=200)
    for cls in registered_patterns().values():
        index = estimate(cls(), query, key, [0, 3])
        width = cls.width([cls(), cls()])
        assert index.head_slots == head_slots([cls()] * 2, range(2), 2)
        assert index.block_index.shape[2:] == (num_query_blocks(200, 0), width.max_blocks)
        assert index.diagonal_index.shape[2] == width.max_diagonals
        assert index.column_index.shape[2] == width.max_columns
        assert all(tensor.dtype == torch.int32 for tensor in index.tensors())


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_dense_fallback_equals_full_reference(window, padded, softcap, with_sinks):
    from mpass.lowering.reference.dense import dense_attention as fallback

    query, key, value = random_attention(batch=2, num_queries=600, num_keys=650)
    key_mask = torch.arange(650).expand(2, -1) >= torch.tensor([[0], [90]]) if padded else None
    mask = AttentionMask(query_offset=50, window=window, key_mask=key_mask)
    sinks = torch.randn(4) if with_sinks else None
    index = mpass.Dense.estimate(
        EstimateInputs(query, key, mask, range(4), 0.2), [mpass.Dense()] * 4
    )
    settings = {"scale": 0.2, "softcap": softcap, "sink_logits": sinks}
    given = AttentionInputs(query, key, value, mask, **settings)
    out = fallback(given)
    expected = reference.sparse_attention(given, index)
    assert torch.allclose(out, expected, atol=1e-5)


def test_dense_fallback_keeps_nan_of_keys_that_are_seen():
    from mpass.lowering.reference.dense import dense_attention as fallback

    query, key, value = random_attention(num_queries=200)
    key[:, :, 100] = torch.nan
    mask = AttentionMask(key_mask=(torch.arange(200) >= 20)[None])
    out = fallback(AttentionInputs(query, key, value, mask, 0.2))
    assert out[:, :, 100:].isnan().all()
    assert torch.equal(out[:, :, :20], torch.zeros_like(out[:, :, :20]))
