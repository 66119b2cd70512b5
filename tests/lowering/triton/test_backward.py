"""Generated gradients, interpreted, against fp64 autograd over the computed cells."""

from __future__ import annotations

import pytest
import torch

import mpass.lowering.training_ops  # noqa: F401  (defines the op)
from mpass.lowering.index import ALL_BLOCKS, AttentionMask, IndexWidth, SparseIndex, list_slots
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.lse_ops import every_key
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.backward import ForwardResult
from mpass.lowering.triton import LOWERING, turned
from mpass.lowering.triton.backward import attention_backward
from mpass.lowering.triton.dry_run import dry_run
from tests.helpers.fake_gpu import meta_gpu
from tests.helpers.op_functions import op_functions
from tests.helpers.pairwise import pairwise
from tests.helpers.triton_cases import SLOTS, padding, poisoned_memory, random_index
from tests.helpers.truth import dense_gradients, random_attention

BLOCKS_ONLY = IndexWidth(max_blocks=2, max_diagonals=2)
WITH_COLUMNS = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=70)
WIDTHS = {"blocks": BLOCKS_ONLY, "columns": WITH_COLUMNS}

FLAGS = {
    "plain": {},
    "window": {"window": 70},
    "narrow window": {"window": 9},
    "padding": {"padded": True},
    "offset": {"offset": 37},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "bidirectional": {"causal": False},
    "window both ways": {"causal": False, "window": 70, "padded": True},
    "every key": {"whole": True},
    "all": {"window": 90, "padded": True, "offset": 37, "softcap": 3.0, "sinks": True},
}

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest norm of the error over the norm of the truth, of any gradient."""


def check(
    slots: tuple[int, ...] = SLOTS["lists"],
    width: IndexWidth = WITH_COLUMNS,
    *,
    num_queries: int = 100,
    head_dim: int = 16,
    value_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    padded: bool = False,
    offset: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: bool = False,
    scale: float = 0.2,
    whole: bool = False,
) -> tuple[AttentionInputs, SparseIndex, ForwardResult]:
    """Compare with autograd in fp64; returns what the kernels were given."""
    batch, num_keys = 2 if padded else 1, num_queries + offset
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    mask = AttentionMask(causal, offset, window, padding(batch, num_keys) if padded else None)
    heads = len(slots)
    tensors = random_attention(
        batch, heads, max(1, heads // 2), num_queries, num_keys, head_dim, value_dim, dtype
    )
    logits = torch.linspace(-1, 2, heads) if sinks else None
    inputs = AttentionInputs(*tensors, mask, scale, softcap, logits)
    index = every_key(inputs) if whole else random_index(slots, mask, width=width, **sizes)
    wide = AttentionInputs(*(t.double() for t in tensors), mask, scale, softcap, logits)
    out, lse = reference.sparse_attention_lse(wide, index)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = ForwardResult(grad_out, out.to(dtype), lse.float())
    with poisoned_memory():
        found = attention_backward(inputs, index, result)
    cells = reference.computed_mask(index, mask, **sizes)
    for one, given, truth in zip(
        found, tensors, dense_gradients(wide, cells, grad_out), strict=False
    ):
        assert one.dtype == dtype and one.shape == given.shape and one.is_contiguous()
        assert (one.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()
    return inputs, index, result


@pytest.mark.parametrize(
    ("form", "flags"),
    [
        ("lists", "plain"),
        ("mixed", "all"),
        ("diagonals", "window both ways"),
        ("shared", "sinks"),
        ("lists", "every key"),
    ],
)
def test_gradients_equal_autograd_over_the_computed_cells(form, flags):
    check(SLOTS[form], **FLAGS[flags])


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "form", "width"), pairwise(FLAGS, SLOTS, WIDTHS))
def test_gradients_of_every_form_and_flag_equal_autograd(flags, form, width):
    check(SLOTS[form], WIDTHS[width], num_queries=150, **FLAGS[flags])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim", "scale"),
    [(torch.bfloat16, 80, 36, 0.1), (torch.float16, 144, 32, -0.1), (torch.float32, 20, 16, 1e-9)],
    ids=str,
)
def test_gradients_of_other_sizes_dtypes_and_scales(dtype, head_dim, value_dim, scale):
    sizes = {"head_dim": head_dim, "value_dim": value_dim}
    check((0, -1), BLOCKS_ONLY, num_queries=70, dtype=dtype, scale=scale, **sizes)


def readers_of(index: SparseIndex, first_row: int, block: int, slot: int) -> list[list[int]]:
    """Query blocks that list a key block, and those that read every one."""
    counts, entries = index.block_count[0, slot], index.block_index[0, slot]
    rows = range(counts.shape[0])
    listed = [r for r in rows if counts[r] > 0 and block in entries[r, : counts[r]].tolist()]
    every = [r for r in rows if counts[r] == ALL_BLOCKS]
    return [[first_row + r for r in found] for found in (listed, every)]


def test_turned_lists_name_the_readers_of_each_key_block(monkeypatch):
    """In ascending order, more than a word of them; one list after the other for want of memory."""
    monkeypatch.setattr(turned, "BITS_BYTES", 1)
    mask = AttentionMask(query_offset=100)
    query, key, _ = random_attention(1, 2, 1, 2150, 2250, 16)
    sizes = {"batch": 1, "num_queries": 2150, "num_keys": 2250}
    index = random_index(list_slots(2), mask, width=IndexWidth(max_blocks=6), **sizes)
    inputs = AttentionInputs(query[:, :, :2150], key, key, mask, 0.2)
    with poisoned_memory():
        found = turned.turn_lists(inputs, index)
    for slot in range(2):
        for block in (0, 1, 20, 35):
            span = found.spans[0, slot, block].tolist()
            listed, every = readers_of(index, 1, block, slot)
            got = found.readers[0, slot, span[0] : span[3]].tolist()
            assert got == [row for row in listed if row >= block]
            got = found.readers[0, slot, span[4] : span[7]].tolist()
            assert got == [row for row in every if row >= block]
            assert found.readers[0, slot, span[1] : span[2]].tolist() == [
                row for row in listed if row > block
            ]


def test_nothing_to_attend_to_gives_zeros():
    query, key, value = random_attention(1, 2, 1, 3, 3, 16)
    inputs = AttentionInputs(query, key[:, :, :0], value[:, :, :0], AttentionMask(), 0.2)
    zero = torch.zeros_like(query)
    result = ForwardResult(zero, zero, torch.full(query.shape[:3], -torch.inf))
    gradients = attention_backward(inputs, every_key(inputs), result)
    assert [t.shape for t in gradients] == [query.shape, key[:, :, :0].shape, value[:, :, :0].shape]
    assert not gradients[0].any()


def test_a_gpu_trains_by_the_generated_kernels(monkeypatch):
    """The op of graphs launches them on a device that Triton's lowering serves."""
    device = meta_gpu(monkeypatch)
    monkeypatch.setenv("MPASS_STRICT", "1")
    query = torch.empty(1, 4, 700, 64, dtype=torch.bfloat16, device=device)
    key = query[:, :2]
    inputs = AttentionInputs(query, key, key, AttentionMask(), 0.2)
    index = every_key(inputs)
    assert LOWERING.attention_backward is not None
    backward = op_functions()["sparse_attention_backward"]
    with dry_run() as run:
        gradients = backward(
            *(query, query, query[..., 0].float(), torch.tensor([False]), query, key, key),
            *(*index.tensors(), list(index.head_slots), None, None, 0, 0, True, 0.2, 0.0),
        )
    turning = ["mark_readers", "list_readers", "plan_keys"]
    expected = ["plan_rows", "query_gradients", *turning, "key_gradients"]
    assert [one.kernel for one in run.launches] == expected
    assert [t.shape for t in gradients[:3]] == [query.shape, key.shape, key.shape]
