"""Text masks of which nothing is known, as numbers per key: rows that see no key are eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mpass.evaluate.coverage import FULL_BUDGET
from mpass.report import reports

B, H, N, D = 3, 4, 80, 16
LOWEST = torch.finfo(torch.float32).min


def causal():
    return torch.ones(N, N, dtype=torch.bool).tril()


def added(x, bias):
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def made_of_ones_and_zeros(x, mask):
    """BERT: the mask is made inside, of an input of which nothing is known."""
    return F.softmax(x @ x.mT / 4 + (1.0 - mask) * LOWEST, -1) @ x


def given_to_sdpa(x, bias):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def below_infinity(x, bias):
    scores = x @ x.mT / 4 + bias
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ x


def replaced_before(x, bias):
    """GPT-2: what is ahead is replaced by a number, then the text mask is added."""
    return (torch.where(causal(), x @ x.mT / 4, LOWEST) + bias).softmax(-1) @ x


def replaced_after(x, bias):
    return (x @ x.mT / 4 + bias).masked_fill(~causal(), LOWEST).softmax(-1) @ x


def added_after(x, bias):
    return (x @ x.mT / 4 + bias + torch.where(causal(), 0.0, -1e30)).softmax(-1) @ x


BOTH_WAYS = (added, made_of_ones_and_zeros, given_to_sdpa)


def hidden_in_the_mask(x, bias):
    """Falcon: the bias becomes the mask, with the causal one in it."""
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias.masked_fill(~causal(), LOWEST))


def added_to_the_mask(x, bias):
    mask = bias + torch.where(causal(), 0.0, -1e4)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


AHEAD = (
    below_infinity,
    replaced_before,
    replaced_after,
    added_after,
    hidden_in_the_mask,
    added_to_the_mask,
)

MASKS = {
    "none": [0, 0, 0],
    "some": [0, 7, 20],
    "a row": [0, 7, N],
    "all": [N, N, N],
}
"""Keys that are hidden from the left, by batch row."""


def compiled(program, x, bias):
    torch._dynamo.reset()
    options = FULL_BUDGET | {"inner_backend": "eager"}
    with torch.no_grad():
        found = torch.compile(program, backend="minference", options=options)(x, bias)
    (site,) = reports()[-1].sites
    return found, site


def inputs(name, lowest, dtype=torch.float32):
    x = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0), dtype=dtype)
    keep = torch.arange(N) >= torch.tensor(MASKS[name])[:, None]
    return x, torch.where(keep, 0.0, lowest).to(dtype)[:, None, None]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("program", BOTH_WAYS)
def test_rows_without_keys_are_the_mean_of_all_values(program, name):
    x, bias = inputs(name, LOWEST)
    given = (bias == 0).float() if program is made_of_ones_and_zeros else bias
    found, site = compiled(program, x, given)
    assert site.status == "sparse", site.reason
    assert torch.allclose(found, program(x, given), atol=1e-5)


@pytest.mark.parametrize("lowest", [-10.0, -1e4, -1e9, -1e30, -torch.inf])
def test_any_number_that_hides_is_eagers(lowest):
    """Of -1e4 a score is left, of -1e9 none; minus infinity gives no number."""
    x, bias = inputs("a row", lowest)
    found, site = compiled(added, x, bias)
    assert site.status == "sparse", site.reason
    tolerance = 1e-3 if lowest == -1e4 else 1e-5  # what eager itself rounds scores to
    assert torch.allclose(found, added(x, bias), atol=tolerance, equal_nan=True)


def test_of_two_numbers_that_hide_the_larger_is_seen():
    x, bias = inputs("a row", LOWEST)
    bias[2, ..., 3:9] = -1e31
    found, _ = compiled(added, x, bias)
    assert torch.allclose(found, added(x, bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_without_keys_in_half_precision(dtype):
    x, bias = inputs("a row", torch.finfo(dtype).min, dtype)
    found, _ = compiled(given_to_sdpa, x, bias)
    assert torch.allclose(found, given_to_sdpa(x, bias), atol=2e-2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("program", AHEAD)
def test_rows_before_the_first_key_are_those_of_eager(program, name):
    x, bias = inputs(name, LOWEST)
    found, site = compiled(program, x, bias)
    assert site.status == "sparse", site.reason
    expected = program(x, bias)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().amax((1, 3))


@pytest.mark.parametrize(("number", "again"), [(LOWEST, False), (-1e9, False), (-1e4, True)])
def test_low_numbers_that_do_not_hide_are_no_reason_to_compute_rows_again(number, again):
    """ALiBi far from the end: below -4096, and far above what hides keys ahead, or not."""
    x, _ = inputs("none", LOWEST)
    bias = 1000.0 * (torch.arange(N) - N + 1)[None, None, None]
    out = torch.full_like(x, 7.0)
    fill = torch.ops.minference.fill_rows_before_keys
    fill(out, x, x, x, bias, 1.0, 0, 0.25, number, "replaced")
    truth = (x @ x.mT / 4 + bias).masked_fill(~causal(), number).softmax(-1) @ x
    changed = (out != 7.0).all(-1)
    assert bool(changed.any()) is again
    assert torch.allclose(out[changed], truth[changed], atol=1e-5)
    below = torch.arange(N) < N - 10  # rows whose best key is below what is ahead of them
    assert not again or bool(changed[:, :, below].all())
