"""flex_attention whose BlockMask lists other blocks than its mask_mod means: never a wrong answer.

`inductor` computes what the lists say, so that is the truth here, beside a brute-force count of
cells.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import mpass
from mpass.evaluate.coverage import FULL_BUDGET
from mpass.lowering.block_mask import BlockLists, attend_as_listed, lists_agree
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import allowed_cells
from tests.helpers.truth import random_attention

OPTIONS = {**FULL_BUDGET, "inner_backend": "inductor"}
N, BLOCK = 512, 128
ROWS = N // BLOCK


def causal(b, h, q, k):
    return q >= k


def sliding(b, h, q, k):
    return (q >= k) & (q - k < 400)


def attend(query, key, value, block_mask):
    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)


def from_lists(block_mask: BlockMask, **changed: Tensor) -> BlockMask:
    """The same BlockMask with some of its lists changed."""
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    lists = [changed.get(name, getattr(block_mask, name)) for name in names]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=BLOCK, mask_mod=block_mask.mask_mod, seq_lengths=block_mask.seq_lengths
    )


def one_block_left_out(block_mask):
    counts = block_mask.full_kv_num_blocks.clone()
    counts[..., -1] -= 1
    return from_lists(block_mask, full_kv_num_blocks=counts)


def another_block_in_its_place(block_mask):
    entries = block_mask.full_kv_indices.clone()
    entries[..., -1, 0] = entries[..., -1, 1]  # as many blocks, one of them twice
    return from_lists(block_mask, full_kv_indices=entries)


def hidden_cells_in_a_full_block(block_mask):
    counts, entries = block_mask.full_kv_num_blocks.clone(), block_mask.full_kv_indices.clone()
    entries[..., 0, 0] = 1
    counts[..., 0] = 1
    return from_lists(block_mask, full_kv_num_blocks=counts, full_kv_indices=entries)


def diagonal_block_left_out(block_mask):
    return from_lists(block_mask, kv_num_blocks=torch.zeros_like(block_mask.kv_num_blocks))


OTHERS = [
    one_block_left_out,
    another_block_in_its_place,
    hidden_cells_in_a_full_block,
    diagonal_block_left_out,
]


@pytest.fixture
def tensors():
    return random_attention(num_queries=N)


@pytest.mark.parametrize("mask_mod", [causal, sliding])
@pytest.mark.parametrize("other", OTHERS)
def test_later_call_with_other_blocks_computes_what_its_lists_say(tensors, mask_mod, other):
    block_mask = create_block_mask(mask_mod, None, None, N, N, device="cpu")
    changed = other(block_mask)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = torch.compile(attend, backend="inductor")(*tensors, changed)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        sparse = torch.compile(attend, backend="minference", options=OPTIONS, fullgraph=True)
        first = sparse(*tensors, block_mask)
        assert len(mpass.last_report().sparse_sites) == 1
        with pytest.warns(RuntimeWarning, match="blocks that its BlockMask lists"):
            later = sparse(*tensors, changed)
        again = sparse(*tensors, block_mask)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(later, expected, atol=1e-5, rtol=0)
    assert (later - first).abs().max() > 1e-2
    assert torch.equal(first, again)


@pytest.mark.parametrize("other", OTHERS)
def test_first_call_with_other_blocks_stays_dense_and_says_so(tensors, other):
    changed = other(create_block_mask(causal, None, None, N, N, device="cpu"))
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = torch.compile(attend, backend="inductor")(*tensors, changed)
        torch._dynamo.reset()
        out = torch.compile(attend, backend="minference", options=OPTIONS)(*tensors, changed)
    (site,) = mpass.last_report().sites
    assert "blocks of the BlockMask are not those of its mask_mod" in site.reason
    assert torch.equal(out, expected)


def test_blocks_that_no_call_has_shown_stay_dense(tensors):
    def call(query, key, value):
        return attend(query, key, value, create_block_mask(causal, None, None, N, N, device="cpu"))

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(call, backend="minference", options=OPTIONS)(*tensors)
        expected = attend(*tensors, create_block_mask(causal, None, None, N, N, device="cpu"))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_check_of_block_lists_passes_opcheck():
    query, key, value = random_attention(num_queries=64)
    counts, entries = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2).int()
    arguments = (torch.randn_like(query), query, key, value, counts, entries, counts, entries)
    rest = (32, 32, None, 0, 0, True, 0.2, 0.0, 3)
    with pytest.warns(RuntimeWarning, match="layer 3"):
        torch.library.opcheck(torch.ops.minference.check_block_lists.default, (*arguments, *rest))


def counted(lists: BlockLists, mask: AttentionMask, num_queries: int, num_keys: int) -> Tensor:
    """How often attention visits each cell, by walking the lists: fp64 [Bm, Hm, Nq, Nk]."""
    batch, heads, rows = lists.kv_num_blocks.shape
    allowed = allowed_cells(mask, torch.arange(num_queries) + mask.query_offset, num_keys)
    batch = max(batch, allowed.shape[0])
    weight = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.float64)
    both = [(lists.kv_num_blocks, lists.kv_indices, allowed.double())]
    if lists.full_kv_num_blocks is not None:
        everything = torch.ones_like(allowed, dtype=torch.float64)
        both.append((lists.full_kv_num_blocks, lists.full_kv_indices, everything))
    for counts, entries, cells in both:
        for b in range(batch):
            for h in range(heads):
                for row in range(rows):
                    place = (b % counts.shape[0], h, row)
                    for column in entries[place][: int(counts[place])].tolist():
                        where = (
                            slice(row * lists.query_block, (row + 1) * lists.query_block),
                            slice(column * lists.key_block, (column + 1) * lists.key_block),
                        )
                        weight[(b, h, *where)] += cells[(b % cells.shape[0], 0, *where)]
    return weight


@st.composite
def cases(draw):
    """Masks with lists that are right, nearly right or arbitrary."""
    batch, num_queries = draw(st.integers(1, 2)), draw(st.integers(1, 70))
    offset = draw(st.sampled_from([0, 0, 5, 32]))
    num_keys = num_queries + offset
    query_block, key_block = draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    key_mask = None
    if draw(st.booleans()):
        key_mask = torch.rand(batch, num_keys, generator=generator) < 0.8
        key_mask[:, draw(st.integers(0, num_keys - 1)) :] = True
    causal_mask = draw(st.booleans())
    window = draw(st.sampled_from([0, 0, 1, 20, 33]))
    mask = AttentionMask(causal_mask, offset, window, key_mask)

    allowed = allowed_cells(mask, torch.arange(num_queries) + offset, num_keys)
    rows, columns = -(-num_queries // query_block), -(-num_keys // key_block)
    lists_batch = batch if key_mask is not None else 1
    some = torch.zeros(lists_batch, 1, rows, columns, dtype=torch.bool)
    every = torch.zeros_like(some)
    for row in range(rows):
        for column in range(columns):
            cells = allowed[
                ...,
                row * query_block : (row + 1) * query_block,
                column * key_block : (column + 1) * key_block,
            ].flatten(2)
            some[:, :, row, column], every[:, :, row, column] = cells.any(-1), cells.all(-1)
    full = every & (torch.rand(every.shape, generator=generator) < draw(st.sampled_from([1, 0.5])))
    partial = some & ~full
    lists = []
    for chosen in (partial, full):
        lists += [chosen.sum(-1).int(), (~chosen).int().argsort(dim=-1, stable=True).int()]
    if draw(st.booleans()):  # break one entry
        broken = lists[draw(st.integers(0, 3))]
        flat = broken.view(-1)
        flat[draw(st.integers(0, len(flat) - 1))] = draw(st.integers(0, columns - 1))
    if not draw(st.booleans()) and int(lists[2].sum()) == 0:
        lists[2:] = [None, None]
    return mask, BlockLists(*lists, query_block, key_block), batch, num_queries, num_keys


@settings(max_examples=150)
@given(cases())
def test_lists_agree_exactly_when_they_visit_each_visible_cell_once(case):
    mask, lists, _, num_queries, num_keys = case
    allowed = allowed_cells(mask, torch.arange(num_queries) + mask.query_offset, num_keys)
    weight = counted(lists, mask, num_queries, num_keys)
    agrees = bool((weight == allowed.double()).all())
    assert bool(lists_agree(lists, mask, num_queries, num_keys)) == agrees


@settings(max_examples=60)
@given(cases())
def test_attention_as_listed_equals_the_brute_force(case):
    mask, lists, batch, num_queries, num_keys = case
    query, key, value = random_attention(batch, 4, 2, num_queries, num_keys, 16)
    out = torch.empty(batch, 4, num_queries, 16)
    inputs = AttentionInputs(query, key, value, mask, scale=0.25, softcap=5.0)
    attend_as_listed(out, inputs, lists)
    keys, values = (t.double().repeat_interleave(2, 1) for t in (key, value))
    scores = 5 * torch.tanh(query.double() @ keys.mT * 0.25 / 5)
    weights = counted(lists, mask, num_queries, num_keys) * scores.exp()
    total = weights.sum(-1, keepdim=True)
    expected = (weights / total.where(total > 0, torch.ones_like(total))) @ values
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_block_mask_with_blocks_of_another_size_becomes_sparse_too(tensors):
    """Dynamo makes a symbol of a block size that changes; it is guarded as Inductor does."""
    torch._dynamo.reset()
    options = {**OPTIONS, "inner_backend": "eager"}
    compiled = torch.compile(attend, backend="minference", options=options, fullgraph=True)
    for size in (128, 64, 32):
        block_mask = create_block_mask(causal, None, None, N, N, device="cpu", BLOCK_SIZE=size)
        with torch.no_grad():
            out = compiled(*tensors, block_mask)
            expected = attend(*(tensor.double() for tensor in tensors), block_mask)
        assert len(mpass.last_report().sparse_sites) == 1
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
