"""Masks that a reader of names would get wrong: each is dense, or equal to eager; neighbours that
can be proven stay sparse. Patterns select every key, so a sparse site must equal eager."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mpass

N = 128
INF = float("inf")
EVERY_KEY = mpass.VerticalSlash(1, 1 << 20)
EVERY_KEY_BOTH_WAYS = mpass.BlockSparse(64)

sdpa = F.scaled_dot_product_attention


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, N, 32, generator=generator) for _ in range(3))
    return query, key, value


def tril() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def positions() -> Tensor:
    return torch.arange(N)


def compare(function, *args, pattern=EVERY_KEY, before=(), validate="sample") -> list[str]:
    """Run eager and compiled; the statuses of the sites. Fails where the results differ.

    before: arguments of a first call, so that numbers which are others in the second are symbols.
    """
    expected = function(*args)
    torch._dynamo.reset()
    options = {
        "pattern": pattern,
        "min_seq_len": 16,
        "dense_above": 2.0,
        "inner_backend": "eager",
        "validate": validate,
        "read_masks": False,  # what is proven, and no more
    }
    with torch.no_grad():
        compiled = torch.compile(function, backend="minference", options=options)
        if before:
            compiled(*before)
        result = compiled(*args)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5, equal_nan=True)
    return [site.status for site in mpass.reports()[-1].sites]


def empty_slice(mask: Tensor) -> Tensor:
    mask = mask & (positions()[:, None] - positions() < 32)
    mask[:, :0] = True
    return mask


def slice_past_the_end(mask: Tensor) -> Tensor:
    mask[:, N:] = False
    return mask


def clipped_slice(mask: Tensor) -> Tensor:
    mask[:, -2 * N : -N] = False
    mask[5:3] = False
    mask[:, : 2 * N] &= True
    return mask


def sinks_in_window(mask: Tensor) -> Tensor:
    wide = torch.ones(N, N, dtype=torch.bool)
    wide[:, -N : N + 7] = True
    return mask & wide


def where_by_keywords(mask: Tensor) -> Tensor:
    return torch.where(mask, input=torch.zeros(()), other=torch.full((), -INF))


def where_swapped_keywords(mask: Tensor) -> Tensor:
    return torch.where(~mask, other=torch.zeros(()), input=torch.full((), -INF))


def where_of_method(mask: Tensor) -> Tensor:
    return torch.zeros(N, N).where(mask, other=-INF)


def alpha_of_rsub(mask: Tensor) -> Tensor:
    # 1 - 2 * mask: 1 and -1, a bias.
    return torch.rsub(mask.float(), 1.0, alpha=2)


def alpha_of_add(mask: Tensor) -> Tensor:
    return torch.add(positions()[:, None], positions(), alpha=-1) >= 0


def alpha_of_wrong_sign(mask: Tensor) -> Tensor:
    return mask & (torch.sub(positions()[:, None], positions(), alpha=2) < 40)


def bits(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8).view(dtype=torch.bool)


def rounded_quotient(mask: Tensor) -> Tensor:
    chunk = torch.div(positions(), 4, rounding_mode="trunc")
    return mask & (chunk[:, None] == chunk)


def cumulated(mask: Tensor) -> Tensor:
    ones = torch.ones(N, dtype=torch.bool).cumsum(0, dtype=torch.int64)
    return ones[:, None] >= ones


def cumulated_small(mask: Tensor) -> Tensor:
    ones = torch.full((N,), 3).cumsum(0, dtype=torch.int8)
    return ones[:, None] >= ones


def le_in_floats(mask: Tensor) -> Tensor:
    bias = positions()[:, None].float().expand(N, N).clone()
    return bias.ge_(positions().float())


def not_in_floats(mask: Tensor) -> Tensor:
    return (~mask).float().logical_not_()


def out_of_floats(mask: Tensor) -> Tensor:
    out = torch.empty(N, N)
    torch.ge(positions()[:, None], positions(), out=out)
    return out


def le_in_bools(mask: Tensor) -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).logical_and_(mask)


def reshaped_in_place(mask: Tensor) -> Tensor:
    mask.unsqueeze_(0)
    mask.unsqueeze_(0)
    return mask & (positions() > -1)[None, None]


def transposed_in_place(mask: Tensor) -> Tensor:
    lower = mask.clone()
    lower.t_()
    return lower.transpose(0, 1) & lower.new_ones(())


def through_bytes(mask: Tensor) -> Tensor:
    hidden = torch.zeros(N, N).masked_fill(~mask, -300.0)
    return hidden.to(torch.int8).float() * 1e6


def through_float8(mask: Tensor) -> Tensor:
    hidden = torch.zeros(N, N).masked_fill(~mask, -1e9)
    return hidden.to(torch.float8_e4m3fn).float().nan_to_num(0.0)


def through_int(mask: Tensor) -> Tensor:
    return mask.int().to(torch.int8).float().bool()


def positions_in_half(mask: Tensor) -> Tensor:
    far = positions() + 2048
    return far[:, None] >= far.half()


def overlapping(mask: Tensor) -> Tensor:
    rows = torch.zeros(2 * N - 1, dtype=torch.bool).as_strided((N, N), (1, 1))
    rows[:, :5] = True
    return rows | mask


def custom_tril(mask: Tensor) -> Tensor:
    return torch.ops.mpass_hostile.tril(torch.ones(N, N, dtype=torch.bool))


def hidden_write(mask: Tensor) -> Tensor:
    mask = mask.int()
    torch.ops.mpass_hostile.hide(mask)
    return mask.bool()


def list_write(mask: Tensor) -> Tensor:
    mask = mask.int()
    torch._foreach_mul_([mask[:, 1:10]], 0)
    return mask.bool()


def new_full(mask: Tensor) -> Tensor:
    return mask.new_full((N, N), True) & mask


@pytest.fixture(scope="module", autouse=True)
def hostile_ops():
    library = torch.library.Library("mpass_hostile", "FRAGMENT")
    library.define("hide(Tensor(a!) x) -> ()")
    library.define("tril(Tensor x) -> Tensor")

    def hide(x):
        x[:, 1:10].zero_()

    library.impl("hide", hide, "CompositeExplicitAutograd")
    library.impl("tril", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.library.register_fake("mpass_hostile::hide", lambda x: None, lib=library)
    torch.library.register_fake("mpass_hostile::tril", torch.empty_like, lib=library)
    yield
    library._destroy()


MASKS = {
    empty_slice: "sparse",
    slice_past_the_end: "sparse",
    clipped_slice: "sparse",
    sinks_in_window: "sparse",
    where_by_keywords: "sparse",
    where_swapped_keywords: "sparse",
    where_of_method: "sparse",
    alpha_of_rsub: "dense",
    alpha_of_add: "sparse",
    alpha_of_wrong_sign: "dense",
    bits: "dense",
    rounded_quotient: "dense",
    cumulated: "sparse",
    cumulated_small: "dense",
    le_in_floats: "dense",
    not_in_floats: "dense",
    out_of_floats: "dense",
    le_in_bools: "sparse",
    reshaped_in_place: "dense",
    transposed_in_place: "dense",
    through_bytes: "dense",
    through_float8: "dense",
    through_int: "sparse",
    positions_in_half: "dense",
    overlapping: "dense",
    custom_tril: "dense",
    hidden_write: "dense",
    list_write: "dense",
    new_full: "sparse",
}


@pytest.mark.parametrize("build", MASKS, ids=lambda build: build.__name__)
def test_mask_is_equal_to_eager(build):
    assert compare(lambda *qkv: sdpa(*qkv, attn_mask=build(tril())), *tensors()) == [MASKS[build]]


def right_padding(dtype: torch.dtype) -> Tensor:
    padding = torch.ones(2, N, dtype=dtype)
    padding[1, 100:] = 0
    return padding


CONDITIONS = {
    "difference": lambda seen: seen - 1 >= 0,
    "negated": lambda seen: -seen < 0,
    "product": lambda seen: seen * 2**40 > 2**39,
    "with positions": lambda seen: positions() + 200 * seen >= 200,
    "as an index": lambda seen: (positions() < N - 28)[seen] | (seen > 0),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_padding_is_computed_in_a_dtype_that_does_not_wrap(dtype, condition):
    """The key mask is made of the small input, and the program widens that first."""

    def attention(query, key, value, padding):
        seen = CONDITIONS[condition](padding[:, None, None].long())
        return sdpa(query, key, value, attn_mask=tril() & seen)

    operands = [tensor.expand(2, 4, N, 32).contiguous() for tensor in tensors()]
    compare(attention, *operands, right_padding(dtype), validate="off")


@pytest.mark.parametrize("index", [[1, 0], ([1, 0],), [0, 0]], ids=str)
def test_an_index_that_is_a_list_takes_rows(index):
    def attention(query, key, value, padding):
        return sdpa(query, key, value, attn_mask=tril() & padding[index][:, None, None])

    operands = [tensor.expand(2, 4, N, 32).contiguous() for tensor in tensors()]
    # What is taken is an unknown tensor of its own; it may well be a key mask.
    assert compare(attention, *operands, right_padding(torch.bool), validate="off") == ["sparse"]


def test_assignment_to_a_list_of_rows():
    def attention(query, key, value):
        mask = tril()
        mask[[3, 9]] = True
        return sdpa(query, key, value, attn_mask=mask)

    assert compare(attention, *tensors(), validate="off") == ["dense"]


@pytest.mark.parametrize("length", [-3, 1, 50, N - 1, N, N + 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_valid_length_from_an_argument(length, causal, dynamic):
    def attention(query, key, value, length):
        seen = (positions() < length)[None].expand(N, N)
        return sdpa(query, key, value, attn_mask=seen & tril() if causal else seen)

    pattern = EVERY_KEY if causal else EVERY_KEY_BOTH_WAYS
    before = (*tensors(), 33) if dynamic else ()
    statuses = compare(attention, *tensors(), length, pattern=pattern, before=before)
    assert statuses == ["dense" if length < 1 else "sparse"]


@pytest.mark.parametrize("length", [-20, 50])
def test_assignment_up_to_an_argument(length):
    def attention(query, key, value, length):
        mask = tril()
        mask[5:, 1:length] = False
        return sdpa(query, key, value, attn_mask=mask)

    for dynamic in (False, True):
        compare(attention, *tensors(), length, before=(*tensors(), 33) if dynamic else ())


def test_arguments_by_keyword_anywhere_do_no_harm():
    def attention(query, key, value):
        query = torch.div(query, other=5.0)
        key = torch.cat(tensors=[key, key], dim=2)[:, :, :N]
        return sdpa(query, key, value, is_causal=True)

    assert compare(attention, *tensors()) == ["sparse"]


def row_by_row(query, key, value):
    mask = torch.full((600, 600), -INF)
    for i in range(600):
        mask[i, max(0, i - 63) : i + 1] = 0.0
    return sdpa(query, key, value, attn_mask=mask[None, None])


def test_mask_written_row_by_row_is_given_up_at_once(monkeypatch):
    from mpass import backend

    times = []
    find = backend.find_attention

    def timed(gm):
        start = time.process_time()
        sites = find(gm)
        times.append(time.process_time() - start)
        return sites

    monkeypatch.setattr(backend, "find_attention", timed)
    query = torch.randn(1, 2, 600, 16)
    assert compare(row_by_row, query, query, query) == ["dense"]
    assert "takes more than" in mpass.last_report().sites[0].reason
    assert times[-1] < 1.0


def test_mask_of_many_parts_is_given_up_soon():
    def attention(query, key, value):
        mask = tril()
        for i in range(60):
            mask = torch.where(positions() % (i + 2) == 1, mask, mask ^ (positions() > i))
        return sdpa(query, key, value, attn_mask=mask | tril())

    start = time.process_time()
    compare(attention, *tensors())
    assert time.process_time() - start < 20
