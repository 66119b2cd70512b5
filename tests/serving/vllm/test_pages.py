"""Keys and values are read out of pages of any layout, which is asked of what writes them."""

from __future__ import annotations

import pytest
import torch

from mpass.serving.vllm.pages import PageLayout, gather, learn_layout


def rows(tokens, page):
    """Token after token."""
    page[:] = tokens


def columns(tokens, page):
    """Transposed, as vLLM's "vec" kernels keep keys."""
    page.view(-1).copy_(tokens.t().reshape(-1))


def tiles(tokens, page):
    """Pairs of dimensions side by side in tiles of 16 tokens, as AMX wants them."""
    size, dim = tokens.shape
    parts = tokens.view(size // 16, 16, dim // 2, 2).transpose(1, 2)
    page.view(-1).copy_(parts.reshape(-1))


def writer(store_key, store_value):
    """What stores whole pages in the manner of vLLM's kernel."""

    def write(key, value, key_pages, value_pages, slots):
        size = key_pages.shape[2]
        assert torch.equal(slots % size, torch.arange(len(slots)) % size)
        for head in range(key.shape[1]):
            for start in range(0, len(slots), size):
                page, part = int(slots[start]) // size, slice(start, start + size)
                store_key(key[part, head], key_pages[page, head])
                store_value(value[part, head], value_pages[page, head])

    return write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("store_key", [rows, columns, tiles])
@pytest.mark.parametrize("size, dim", [(16, 32), (32, 64), (128, 80)])
def test_what_was_written_is_read_back(store_key, size, dim, dtype):
    write = writer(store_key, rows)
    layout = learn_layout(write, size, dim, dtype)
    key, value = (torch.randn(4 * size, 2, dim).to(dtype) for _ in range(2))
    pages = torch.zeros(6, 2, size, 2 * dim, dtype=dtype)
    numbers = torch.tensor([5, 0, 3, 1], dtype=torch.int32)
    slots = (numbers[:, None] * size + torch.arange(size)).flatten()
    halves = pages.view(6, 2, 2 * size, dim).chunk(2, dim=2)
    write(key, value, *halves, slots)
    length = 3 * size + 5
    found = gather(pages, torch.cat([numbers, numbers]), length, layout)
    for tensor, expected in zip(found, (key, value), strict=True):
        assert torch.equal(tensor, expected[:length].transpose(0, 1)[None])


@pytest.mark.parametrize("store", [rows, columns])
def test_known_layouts_are_read_by_strides(store):
    layout = learn_layout(writer(store, rows), 32, 64, torch.bfloat16)
    assert layout.halves[0].columns is (store is columns)
    assert all(half.order is None for half in layout.halves)


def test_a_layout_that_loses_elements_is_refused():
    def lose(tokens, page):
        page[:] = tokens[0]

    with pytest.raises(ValueError, match="do not hold every element once"):
        learn_layout(writer(lose, rows), 16, 32, torch.float32)


def test_pages_of_keys_beside_values_may_have_any_strides():
    memory = torch.randn(5, 16, 2, 64)  # [pages, tokens, heads, key and value]
    pages = memory.transpose(1, 2)
    key, value = gather(pages, torch.tensor([4, 2]), 20, PageLayout())
    expected = memory[[4, 2]].flatten(0, 1)[:20].transpose(0, 1)[None]
    assert torch.equal(key, expected[..., :32]) and torch.equal(value, expected[..., 32:])
