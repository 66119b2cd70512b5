"""Biases by distance: T5's buckets and ALiBi both ways are proven, and exact in every spelling."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpass.evaluate.coverage import FULL_BUDGET
from mpass.report import reports
from mpass.validation.validate import ValidationWarning

B, H, N, D = 2, 4, 150, 16
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LOWEST = torch.finfo(torch.float32).min


def apart(queries: int, keys: int, offset: int = 0) -> torch.Tensor:
    """k - q"""
    return torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + offset)


def causal(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def buckets(distance: torch.Tensor, both_ways: bool) -> torch.Tensor:
    """T5's, of 32, with its spelling: assignments in place, min, log of zero and all."""
    found, count = 0, 32
    if both_ways:
        count //= 2
        found += (distance > 0).to(torch.long) * count
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = count // 2
    large = exact + (
        torch.log(distance.float() / exact) / math.log(128 / exact) * (count - exact)
    ).to(torch.long)
    large = torch.min(large, torch.full_like(large, count - 1))
    found += torch.where(distance < exact, distance, large)
    return found


class Buckets(nn.Module):
    """Attention with T5's bias, in the spelling of a function of scores or of a mask."""

    def __init__(self, attend, both_ways):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(32, H)
        nn.init.normal_(self.table.weight, std=2.0)
        self.attend, self.both_ways = attend, both_ways

    def forward(self, x, mask=None):
        n = x.shape[2]
        values = self.table(buckets(apart(n, n), self.both_ways))
        bias = values.permute([2, 0, 1]).unsqueeze(0)
        first = self.attend(x, bias, mask)
        return self.attend(first, bias, mask)  # layers share the bias


def written_out(x, bias, mask):
    scores = x @ x.mT + bias
    return F.softmax(scores + torch.where(causal(x.shape[2]), 0.0, LOWEST), -1) @ x


def with_the_mask_in_it(x, bias, mask):
    """mT5's older spelling: the mask is added to the bias, once for all layers."""
    scores = x @ x.mT
    scores += bias + torch.where(causal(x.shape[2]), 0.0, LOWEST)
    return F.softmax(scores.float(), -1).type_as(scores) @ x


def given_to_sdpa(x, bias, mask):
    mask = torch.where(causal(x.shape[2]), bias, LOWEST).contiguous()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=1.0)


def padded(x, bias, mask):
    mask = torch.where(mask[:, None, None, :], bias, LOWEST).contiguous()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=1.0)


def seen_by_all(x, bias, mask):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def alibi_both_ways(x, mask=None):
    bias = -SLOPES[:, None, None] * apart(x.shape[2], x.shape[2]).abs()
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def of_grouped_heads(x, mask=None):
    shared = x[:, :2].repeat_interleave(2, 1)
    bias = SLOPES.view(H, 1, 1) * apart(x.shape[2], x.shape[2]).float().neg().abs()
    return F.softmax(x @ shared.mT / 4 + -bias + (~causal(x.shape[2])) * -1e9, -1) @ shared


def of_the_last_queries(x, mask=None):
    """A chunk after a cache: the last 100 rows of the whole bias."""
    n = x.shape[2]
    bias = (apart(n, n).float() * 0.1).tanh()[None, None, -100:, :]
    seen = torch.arange(n) <= torch.arange(100)[:, None] + (n - 100)
    scores = x[:, :, -100:] @ x.mT / 4 + bias
    return F.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ x


def repeated_for_the_batch(x, mask=None):
    bias = apart(x.shape[2], x.shape[2]).clamp(-20, 20)[None] * SLOPES[:, None, None]
    bias = bias.expand(x.shape[0], -1, -1, -1).to(x.dtype).contiguous()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


PROGRAMS = {
    "T5's encoder": Buckets(seen_by_all, True),
    "T5's encoder with padding": Buckets(padded, True),
    "T5's decoder": Buckets(given_to_sdpa, False),
    "T5's decoder written out": Buckets(written_out, False),
    "mT5's decoder": Buckets(with_the_mask_in_it, False),
    "ALiBi both ways": alibi_both_ways,
    "grouped heads": of_grouped_heads,
    "a chunk": of_the_last_queries,
    "repeated for the batch": repeated_for_the_batch,
}


def compiled_sites(program, x, *more, **options):
    torch._dynamo.reset()
    if options.pop("dynamic", False):
        for tensor, dim in zip((x, *more), (2, 1), strict=False):
            torch._dynamo.mark_dynamic(tensor, dim)
    options = FULL_BUDGET | {"inner_backend": "eager"} | options
    with torch.no_grad():
        compiled = torch.compile(program, backend="minference", options=options)
        return compiled(x, *more), reports()[-1].sites


def inputs(dtype=torch.float64):
    x = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, 100:] = False
    return x.to(dtype), mask


CASES = [*((name, False) for name in PROGRAMS), ("T5's decoder", True), ("a chunk", True)]


@pytest.mark.parametrize(("name", "dynamic"), CASES)
def test_a_bias_by_distance_is_exact(name, dynamic):
    program = PROGRAMS[name]
    x, mask = inputs()
    with torch.no_grad():
        expected = program.double()(x, mask) if isinstance(program, nn.Module) else program(x, mask)
        program = program.float() if isinstance(program, nn.Module) else program
    found, sites = compiled_sites(program, x.float(), mask, dynamic=dynamic)
    assert {site.status for site in sites} == {"sparse"}, [site.reason for site in sites]
    assert all(any("bias by distance" in line for line in site.mask) for site in sites)
    kept = mask[:, None, -found.shape[2] :, None]
    worst = ((found.double() - expected) * kept).abs().max()
    assert worst < 1e-4, worst


def test_the_bias_of_every_pair_is_gone():
    """What is left of the graph has no tensor of Nq x Nk: the bias is made for each distance."""
    seen = []

    def inner(gm, example_inputs):
        seen.append([node.meta.get("example_value") for node in gm.graph.nodes])
        return gm

    from torch._dynamo.backends.registry import register_backend

    register_backend(inner, name="mpass_sizes_of_distances")
    x, mask = inputs(torch.float32)
    _, sites = compiled_sites(
        PROGRAMS["T5's decoder"], x, mask, inner_backend="mpass_sizes_of_distances"
    )
    assert len(sites) == 2
    sizes = [value.shape for value in seen[0] if isinstance(value, torch.Tensor)]
    assert not any(list(size[-2:]) == [N, N] for size in sizes)
    lines = [size for size in sizes if list(size) == [H, 2 * N - 1]]
    assert len(lines) == 1  # of both layers


def test_tokens_with_a_bias_by_distance_keep_their_order():
    """A grid is for attention whose tokens may be seen in the order of tiles."""
    x, mask = inputs(torch.float32)
    x = x[:, :, :144].contiguous()
    found, sites = compiled_sites(alibi_both_ways, x, mask, grid=(12, 12))
    assert [site.status for site in sites] == ["sparse"]
    assert torch.allclose(found, alibi_both_ways(x), atol=1e-4)


def of_each_row(x):
    bias = apart(N, N) * x[0, 0, :, :1]
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def of_other_positions(x):
    """Positions that are data: nobody knows that they are one after the other."""
    place = (x[0, 0, :, 0] * 100).long()
    bias = (place[None, :] - place[:, None]).float() * 0.1
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def of_the_sum(x):
    bias = (torch.arange(N)[None, :] + torch.arange(N)[:, None]) * 0.1
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def turned_round(x):
    bias = (apart(N, N) * 0.1).mT
    return F.softmax(x @ x.mT / 4 + bias.relu(), -1) @ x


def in_steps(x):
    bias = (apart(2 * N, 2 * N) * 0.1).tanh()[::2, ::2]
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def of_random_numbers(x):
    bias = torch.rand_like(apart(N, N).float()) * apart(N, N)
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def written_before(x):
    bias = apart(N, N) * 0.1
    bias[0, 0] = 5.0
    return F.softmax(x @ x.mT / 4 + bias, -1) @ x


def written_later(x):
    bias = apart(N, N) * 0.1
    weights = F.softmax(x @ x.mT / 4 + bias, -1)
    bias.zero_()
    return weights @ x


def of_each_batch_row(x):
    slopes = x[:, :1, :1, :1]
    return F.softmax(x @ x.mT / 4 + slopes * apart(N, N).abs(), -1) @ x


def of_two_distances(x):
    scores = x @ x.mT / 4 + (apart(N, N) * 0.1).relu()
    return F.softmax(scores + (apart(N, N) * 0.3).tanh(), -1) @ x


def under_a_softcap(x):
    scores = 30 * torch.tanh((x @ x.mT / 4 + (apart(N, N) * 0.1).relu()) / 30)
    return F.softmax(scores, -1) @ x


def under_an_unproven_mask(x):
    seen = x[0, 0] @ x[0, 0].mT > 0
    return F.softmax((x @ x.mT / 4 + (apart(N, N) * 0.1).relu()).masked_fill(~seen, -1e9), -1) @ x


NO_BIAS_BY_DISTANCE = (
    of_each_row,
    of_other_positions,
    of_the_sum,
    turned_round,
    in_steps,
    of_random_numbers,
    written_before,
    written_later,
    of_each_batch_row,
    of_two_distances,
    under_a_softcap,
    under_an_unproven_mask,
)


@pytest.mark.parametrize("program", NO_BIAS_BY_DISTANCE, ids=lambda program: program.__name__)
def test_what_is_no_bias_by_distance_stays_dense(program):
    x, _ = inputs(torch.float32)
    torch.manual_seed(0)
    expected = program(x)
    torch.manual_seed(0)
    found, sites = compiled_sites(program, x, read_masks=False)
    assert [site.status for site in sites] == ["dense"], sites
    assert torch.allclose(found, expected, atol=1e-4)


def test_rows_without_keys_are_the_mean_where_low_numbers_hide_them():
    program = PROGRAMS["T5's encoder with padding"].float()
    x, mask = inputs(torch.float32)
    mask[1] = False
    with torch.no_grad():
        expected = program(x, mask)
    found, sites = compiled_sites(program, x, mask)
    assert {site.status for site in sites} == {"sparse"}
    assert torch.allclose(found, expected, atol=1e-4)


def hidden_by_small_numbers(x, mask):
    bias = torch.where(mask[:, None, None, :], (apart(N, N) * 0.1).tanh()[None, None], -10000.0)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def test_rows_without_keys_are_dense_where_numbers_leave_something_of_scores():
    x, mask = inputs(torch.float32)
    mask[1] = False
    expected = hidden_by_small_numbers(x, mask)
    found, sites = compiled_sites(hidden_by_small_numbers, x, mask, read_masks=False)
    assert [site.status for site in sites] == ["dense"]
    assert "have a bias by distance" in sites[0].reason
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("program", [alibi_both_ways, PROGRAMS["T5's encoder"]])
def test_proofs_with_a_bias_are_held_against_the_graph(program, monkeypatch):
    """Validation sees a bias that is claimed a position off."""
    from mpass.masks import distances

    size = distances.DistanceReader.size

    def moved(self, expr):
        found = size(self, expr)
        return found + 1 if isinstance(found, int) and found < 0 else found

    monkeypatch.delenv("MPASS_STRICT", raising=False)
    monkeypatch.setattr(distances.DistanceReader, "size", moved)
    x, _ = inputs(torch.float32)
    program = program.float() if isinstance(program, nn.Module) else program
    with pytest.warns(ValidationWarning):
        _, sites = compiled_sites(program, x)
    assert {site.status for site in sites} == {"dense"}


@pytest.mark.parametrize(
    ("blind", "trains", "words"),
    [
        (True, True, "a bias by distance is not seen by block_sparse on this device"),
        (False, False, "no gradient of a bias by distance is computed on device 'cpu'"),
    ],
)
def test_what_a_device_does_not_know_of_a_bias_keeps_it_dense(blind, trains, words, monkeypatch):
    from mpass.lowering import dispatch
    from mpass.lowering.estimators import BLOCK_SPARSE

    cpu = dispatch.find_lowering("cpu")
    unknown = frozenset({BLOCK_SPARSE}) if blind else frozenset()
    other = dataclasses.replace(cpu, blind=unknown, trains_bias=trains)
    monkeypatch.setitem(dispatch._added, "cpu", other)
    x, _ = inputs(torch.float32)
    torch._dynamo.reset()
    options = FULL_BUDGET | {"training": "sparse", "inner_backend": "aot_eager"}
    compiled = torch.compile(alibi_both_ways, backend="minference", options=options)
    compiled(x.requires_grad_(not blind))
    assert [site.reason for site in reports()[-1].sites] == [words]
