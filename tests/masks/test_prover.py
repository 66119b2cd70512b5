"""What masks mean: spelled in many ways, proven, and compared cell by cell with the real mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.recording import record

B, H, N, D = 2, 4, 12, 8
HIDDEN = torch.finfo(torch.float32).min


def tensors(num_queries: int = N, num_keys: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(B, H, n, D, generator=generator) for n in (num_queries, num_keys))
    return query, key, key.flip(-1)


def pads() -> Tensor:
    """An integer attention_mask with left padding in one row and right padding in the other."""
    mask = torch.ones(B, N, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    return mask


# Each takes the number of positions (an int or a SymInt) and the padding [B, N].
def lower_triangle(n, _pad):
    return torch.ones(n, n, dtype=torch.bool).tril()


def triangle_of_infinities(n, _pad):
    return torch.triu(torch.full((n, n), float("-inf")), diagonal=1)


def triangle_in_place(n, _pad):
    mask = torch.zeros(n, n)
    mask.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu_(1), HIDDEN)
    return mask[None, None]


def compared_positions(n, _pad):
    position = torch.arange(n)
    return position[None, :] <= position[:, None]


def negated(n, _pad):
    position = torch.arange(n)
    return ~(position.view(1, -1) > position.view(-1, 1))


def where_minimum(n, _pad):
    seen = torch.arange(n)[:, None] >= torch.arange(n)
    return torch.where(seen, 0.0, HIDDEN)


def one_minus(n, _pad):
    return (1.0 - torch.tril(torch.ones(n, n))) * -1e9


def filled_where_it_is_one(n, _pad):
    """The mask of litgpt's models with a softcap: a choice inside of a choice."""
    mask = torch.ones(n, n).triu(1)
    return mask.masked_fill_(mask.bool(), torch.finfo(torch.float32).min)


def window(n, _pad):
    position = torch.arange(n)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < 4)


def window_by_triangles(n, _pad):
    ones = torch.ones(n, n, dtype=torch.bool)
    return ones.tril() & ones.triu(-3)


def window_both_ways(n, _pad):
    position = torch.arange(n)
    return (position[:, None] - position).abs() <= 3


def window_both_ways_by_triangles(n, _pad):
    ones = torch.ones(n, n, dtype=torch.bool)
    return ones.tril(3) & ones.triu(-3)


def window_both_ways_in_halves(n, pad):
    """As transformers writes it for ModernBERT, with padding."""
    position = torch.arange(n)
    distance = position[:, None] - position
    back, ahead = (distance >= 0) & (distance <= 3), (distance < 0) & (-distance <= 3)
    return (back | ahead)[None, None] & pad.bool()[:, None, None, :]


def window_both_ways_of_everything(n, _pad):
    position = torch.arange(n)
    return (position[:, None] - position).abs() <= 40


def padded(n, pad):
    return torch.ones(n, n, dtype=torch.bool).tril() & pad.bool()[:, None, None, :]


def padded_by_equality(n, pad):
    position = torch.arange(n)
    return (position <= position[:, None])[None, None] & (pad[:, None, None, :] == 1)


def padded_by_gather(n, pad):
    rows, columns = torch.arange(pad.shape[0]), torch.arange(n)
    seen = pad.to(torch.bool)[rows[:, None, None, None], columns[None, None, None, :]]
    return seen & (columns <= columns[:, None])[None, None]


def two_additive(n, pad):
    causal = torch.triu(torch.full((n, n), HIDDEN), 1)
    hidden = torch.zeros(pad.shape).masked_fill(pad == 0, HIDDEN)
    return causal[None, None] + hidden[:, None, None, :]


def first_keys_hidden(n, _pad):
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    mask[:, :3] = False
    return mask


def only_padding(n, pad):
    return pad.bool()[:, None, None, :].expand(-1, 1, n, -1)


def packed_but_one_sequence(n, _pad):
    position = torch.arange(n)[None]
    change = torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1
    sequence = change.cumsum(-1)
    same = sequence[:, :, None] == sequence[:, None, :]
    return (same & (position[:, None, :] <= position[:, :, None]))[:, None]


def chunks_beyond_the_end(n, _pad):
    position = torch.arange(n)
    same = (position // 4096)[:, None] == (position // 4096)[None, :]
    return same & (position <= position[:, None])


def every_key(n, _pad):
    return torch.ones(n, n, dtype=torch.bool)


PROVEN = {
    lower_triangle: {"causal": True},
    triangle_of_infinities: {"causal": True},
    triangle_in_place: {"causal": True},
    compared_positions: {"causal": True},
    negated: {"causal": True},
    where_minimum: {"causal": True},
    one_minus: {"causal": True},
    filled_where_it_is_one: {"causal": True},
    window: {"causal": True, "window": 4},
    window_both_ways: {"causal": False, "window": 4},
    window_both_ways_by_triangles: {"causal": False, "window": 4},
    window_both_ways_in_halves: {"causal": False, "window": 4},
    window_by_triangles: {"causal": True, "window": 4},
    padded: {"causal": True},
    padded_by_equality: {"causal": True},
    padded_by_gather: {"causal": True},
    two_additive: {"causal": True},
    first_keys_hidden: {"causal": True},
    only_padding: {"causal": False},
    packed_but_one_sequence: {"causal": True},
    every_key: {"causal": False},
}
PADDED = {
    padded,
    padded_by_equality,
    padded_by_gather,
    two_additive,
    only_padding,
    window_both_ways_in_halves,
}


def attend(build):
    def attention(query, key, value, pad):
        return F.scaled_dot_product_attention(query, key, value, build(query.shape[2], pad))

    return attention


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("build", PROVEN, ids=lambda build: build.__name__)
def test_mask_is_proven_and_equals_the_real_one(build, dynamic):
    stacked, pad = torch.stack(tensors()), pads()
    if dynamic:
        torch._dynamo.mark_dynamic(stacked, 3)
        torch._dynamo.mark_dynamic(pad, 1)
    (found,), _ = record(lambda stacked, pad: attend(build)(*stacked, pad), stacked, pad)
    meaning = found.site.mask
    assert meaning is not None, found.site.unproven
    expected = {"window": 0, "query_offset": 0, **PROVEN[build]}
    assert {name: getattr(meaning, name) for name in expected} == expected
    assert (meaning.key_mask is not None) == (build in PADDED or build is first_keys_hidden)
    assert found.wrong_cells() == 0
    assert found.error() < 1e-5


def test_window_both_ways_that_reaches_every_key_is_no_window():
    (found,), _ = record(attend(window_both_ways_of_everything), *tensors(), pads())
    meaning = found.site.mask
    assert not meaning.causal and meaning.window == 0 and found.wrong_cells() == 0


def test_chunks_beyond_the_last_key_are_no_restriction():
    (found,), _ = record(attend(chunks_beyond_the_end), *tensors(), pads())
    assert found.site.mask.causal and found.wrong_cells() == 0


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_causal_offset_of_a_chunk_after_cached_keys(dynamic):
    def attention(query, keys, cached):
        key, value = keys
        before = cached.shape[0]
        rows = torch.arange(query.shape[2]) + before
        seen = torch.arange(query.shape[2] + before) <= rows[:, None]
        return F.scaled_dot_product_attention(query, key, value, seen)

    query, key, value = tensors(5, 12)
    keys, cached = torch.stack([key, value]), torch.zeros(7)
    if dynamic:
        torch._dynamo.mark_dynamic(query, 2)
        torch._dynamo.mark_dynamic(cached, 0)
        torch._dynamo.mark_dynamic(keys, 3)
    (found,), _ = record(attention, query, keys, cached)
    assert found.site.mask is not None, found.site.unproven
    assert isinstance(found.site.mask.query_offset, torch.SymInt if dynamic else int)
    assert found.wrong_cells() == 0
    assert found.error() < 1e-5


def test_is_causal_is_aligned_to_the_upper_left():
    def attention(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    (found,), _ = record(attention, *tensors(5, 12))
    assert found.site.mask.query_offset == 0
    assert found.error() < 1e-5


def test_valid_length_that_causality_implies_is_dropped():
    def attention(query, key, value):
        position = torch.arange(12)
        seen = (position <= torch.arange(5)[:, None]) & (position < 5)
        return F.scaled_dot_product_attention(query, key, value, seen)

    (found,), _ = record(attention, *tensors(5, 12))
    assert found.site.mask.valid_keys is None and found.site.mask.causal
    assert found.wrong_cells() == 0


def test_valid_length_without_causality_is_kept():
    def attention(query, key, value):
        seen = (torch.arange(12) < 9).expand(5, 12)
        return F.scaled_dot_product_attention(query, key, value, seen)

    (found,), _ = record(attention, *tensors(5, 12))
    assert found.site.mask.valid_keys == 9
    assert found.wrong_cells() == 0


UNPROVEN = {
    "strictly causal": (lambda n, pad: torch.ones(n, n).tril(-1).bool(), "own position"),
    "lopsided window": (
        lambda n, pad: torch.ones(n, n).tril(2).triu(-5).bool(),
        "window of 5 keys back and 2 ahead",
    ),
    "upper triangle": (lambda n, pad: torch.ones(n, n).triu().bool(), "window without causality"),
    "per head": (
        lambda n, pad: torch.arange(n) <= torch.arange(n)[:, None] + torch.arange(4)[:, None, None],
        "per head",
    ),
    "padding of queries": (
        lambda n, pad: torch.ones(n, n).tril().bool() & pad.bool()[:, None, :, None],
        "pad",
    ),
    "padding or causal": (
        lambda n, pad: torch.ones(n, n).tril().bool() | pad.bool()[:, None, None, :],
        "pad",
    ),
    "op of heads": (
        lambda n, pad: torch.arange(n) <= torch.arange(4 * n * n).reshape(4, n, n).sin(),
        "not understood",
    ),
    "bias": (lambda n, pad: torch.triu(torch.full((n, n), -5.0), 1), "bias"),
    "product of positions": (
        lambda n, pad: (torch.arange(n) * torch.arange(n)[:, None]).float(),
        "bias",
    ),
    "chunks": (
        lambda n, pad: (
            (torch.arange(n) // 4 == torch.arange(n)[:, None] // 4) & torch.ones(n, n).tril().bool()
        ),
        "chunks of 4",
    ),
    "positions in bfloat16": (
        lambda n, pad: (
            torch.arange(n, dtype=torch.bfloat16) <= torch.arange(n, dtype=torch.bfloat16)[:, None]
        ),
        "arange",
    ),
    "data": (lambda n, pad: torch.ones(n, n).tril().bool() & (pad.sum() > 3), "sum"),
    "random": (lambda n, pad: torch.rand(n, n) > 0.1, "rand"),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_no_known_mask_stays_dense_with_a_reason(name):
    build, reason = UNPROVEN[name]
    (found,), _ = record(attend(build), *tensors(), pads())
    assert found.site.mask is None
    assert reason in found.site.unproven


def test_mask_that_is_changed_between_two_attentions_is_read_twice():
    def attention(query, key, value):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        first = F.scaled_dot_product_attention(query, key, value, mask)
        mask.logical_not_()
        return first + F.scaled_dot_product_attention(query, key, value, mask)

    (first, second), _ = record(attention, *tensors())
    assert first.site.mask is not None and first.wrong_cells() == 0
    assert second.site.mask is None


def test_mask_that_is_written_through_a_view_is_not_proven():
    def attention(query, key, value):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        mask.view(-1)[5] = True
        return F.scaled_dot_product_attention(query, key, value, mask)

    (found,), _ = record(attention, *tensors())
    assert found.site.mask is None or found.wrong_cells() == 0
    assert found.site.mask is None


def test_key_mask_of_an_input_written_later_is_not_taken():
    def attention(query, key, value, pad):
        mask = torch.ones(N, N, dtype=torch.bool).tril() & (pad == 1)[:, None, None, :]
        pad.add_(1)
        return F.scaled_dot_product_attention(query, key, value, mask)

    (found,), _ = record(attention, *tensors(), pads())
    assert found.site.mask is None or found.wrong_cells() == 0


def test_buffer_of_the_model_is_not_trusted():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(N, N, dtype=torch.bool).tril())

        def forward(self, query, key, value):
            return F.scaled_dot_product_attention(query, key, value, self.mask)

    (found,), _ = record(Model(), *tensors())
    assert found.site.mask is None
    assert "values are unknown when compiling" in found.site.unproven


def test_masks_shared_by_layers_are_read_once():
    def attention(query, key, value, pad):
        mask = padded(query.shape[2], pad)
        for _ in range(6):
            query = F.scaled_dot_product_attention(query, key, value, mask)
        return query

    found, _ = record(attention, *tensors(), pads())
    assert len(found) == 6
    assert len({id(each.site.mask) for each in found}) == 1


def test_exported_graph_is_read_too():
    from mpass.match import find_attention

    class Model(torch.nn.Module):
        def forward(self, query, key, value, pad):
            mask = window(query.shape[2], pad) & pad.bool()[:, None, None, :]
            return F.scaled_dot_product_attention(query, key, value, mask)

    length = torch.export.Dim("length", min=4, max=4096)
    shapes = {name: {2: length} for name in ("query", "key", "value")} | {"pad": {1: length}}
    program = torch.export.export(Model(), (*tensors(), pads()), dynamic_shapes=shapes)
    (site,) = find_attention(program.graph_module)
    assert site.mask is not None, site.unproven
    assert (site.mask.causal, site.mask.window) == (True, 4)
    assert site.mask.key_mask is not None
