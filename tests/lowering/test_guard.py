"""Prompts that fool an estimate: a promised loss holds on them, by more blocks or by dense rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mpass
from mpass.config.promise import left_out, most_lost, pattern_for_loss
from mpass.lowering.exact_rows import rows_to_look_at
from mpass.lowering.guard import OVER_ALL, guarded
from mpass.lowering.index import ALL_BLOCKS, ALL_DIAGONALS, AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference.attention import computed_mask
from mpass.patterns.union import Union
from tests.helpers.toys import compile_toy
from tests.helpers.truth import random_attention

LENGTH, DIM, HEADS = 1024, 32, 2

MOST = 0.075
"""Three times the share of attention that texts lose at the promise of 0.01 (docs/accuracy.md)."""


class Attention(nn.Module):
    def forward(self, query, key, value):
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention()])

    def forward(self, query, key, value):
        return self.layers[0](query, key, value)


def uniform():
    """Every key weighs the same."""
    query, key, value = random_attention(
        heads=HEADS, kv_heads=HEADS, num_queries=LENGTH, head_dim=DIM
    )
    return query * 0, key, value


def permuted(of_half: bool):
    """Each query looks for one earlier key of its own, at a random place; or the second half."""
    _, key, value = random_attention(heads=HEADS, kv_heads=HEADS, num_queries=LENGTH, head_dim=DIM)
    key = nn.functional.normalize(key, dim=-1)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    place = order % (torch.arange(LENGTH) + 1)
    sought = 60.0 * key[:, :, place]
    if of_half:
        sought[:, :, : LENGTH // 2] = 60.0 * key[:, :, : LENGTH // 2]
    return sought, key, value


def needles():
    """A needle per 100 tokens, which every later query looks for; the rest is even."""
    query, key, value = random_attention(
        heads=HEADS, kv_heads=HEADS, num_queries=LENGTH, head_dim=DIM
    )
    key[..., 0] = 0.0
    key[:, :, 50::100, 0] = 8.0
    query[..., 0] = 6.0
    return query, key, value


def hidden():
    """As permuted, but the neighbours of each key cancel it in any mean, and a decoy shines."""
    query, key, value = permuted(of_half=False)
    key[:, :, 1::2] = -key[:, :, ::2]
    query = 60.0 * key[:, :, (torch.arange(LENGTH) * 5 // 17) % LENGTH]
    key[:, :, :64] = 0.0
    key[..., 0], query[..., 0] = 0.0, 6.0
    key[:, :, :64, 0] = 5.0  # in the sink block, which is kept
    return query, key, value


def lost_mass(query, key, cells):
    """The greatest share of attention that a head loses outside of `cells`, mean over queries."""
    scores = query.double() @ key.double().mT * DIM**-0.5
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return float((weights * ~cells).sum(-1).mean(-1).max())


PROMPTS = {
    "uniform": (uniform, True),
    "permuted": (lambda: permuted(of_half=False), False),
    "second half permuted": (lambda: permuted(of_half=True), False),
    "needles": (needles, False),
    "hidden by neighbours": (hidden, True),
}
"""Prompts, and whether the shares of single rows would lose too much without floor and guard."""


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("prompt", "fools"), PROMPTS.values(), ids=PROMPTS)
def test_a_promised_loss_holds_on_prompts_that_fool_the_estimate(prompt, fools):
    query, key, value = (each.contiguous() for each in prompt())
    model, promised = Attention(), pattern_for_loss(0.01)
    compiled = compile_toy(model, {"max_loss": 0.01})
    with mpass.record() as log:
        out = compiled(query, key, value)
    (call,) = log.calls
    if call.lowering == "dense":
        assert torch.allclose(out, model(query, key, value), atol=1e-4)
        assert "of the work" in call.reason or "attention would be lost" in call.reason
    else:
        assert lost_mass(query, key, promised.dense_mask(query, key)) < MOST
    bare = replace(promised, mass=0.05)
    assert (lost_mass(query, key, bare.dense_mask(query, key)) > MOST) == fools


def test_estimates_that_are_wrong_of_a_head_are_noticed():
    query, key, value = hidden()
    inputs = AttentionInputs(query, key, value, AttentionMask(), DIM**-0.5)
    patterns = [pattern_for_loss(0.01)] * HEADS
    index = Union.estimate(
        EstimateInputs(query, key, AttentionMask(), range(HEADS), DIM**-0.5), patterns
    )
    lost = lost_mass(query, key, patterns[0].dense_mask(query, key))
    assert lost > most_lost(0.01) == 2 * left_out(0.01)
    found = guarded(inputs, index, 0.4)
    assert "of a head's attention would be lost, 40% may be" in found.why
    together = guarded(inputs, index, 0.9)
    assert "of all heads' attention would be lost, 32% may be" in together.why
    assert guarded(inputs, index, 1.0).index is index


def test_one_wrong_head_keeps_every_key_and_others_what_they_kept():
    query, key, value = random_attention(heads=HEADS, kv_heads=1, num_queries=600, head_dim=DIM)
    mask = AttentionMask()
    inputs = AttentionInputs(query, key, value, mask, DIM**-0.5)
    patterns = [Union(0.1, 1.0, 0, 1, 1, max_blocks=2), Union(1.0, columns=0)]
    index = Union.estimate(EstimateInputs(query, key, mask, range(HEADS), DIM**-0.5), patterns)
    found = guarded(inputs, index, 0.2, measured=48)
    assert bool((found.index.block_count[:, 0] == ALL_BLOCKS).all())
    assert torch.equal(found.index.block_count[:, 1], index.block_count[:, 1])
    assert float(found.losses.lost.max()) < 1e-5
    assert found.losses.exact.shape == (1, HEADS, 48, DIM)
    shared = guarded(inputs, replace(index, head_slots=(0, 0)), 0.2).index
    assert bool((shared.block_count[:, 0] == ALL_BLOCKS).all())


def test_heads_of_diagonals_are_made_whole_as_well():
    query, key, value = random_attention(heads=2, kv_heads=1, num_queries=600, head_dim=DIM)
    mask = AttentionMask()
    index = mpass.AShape.estimate(
        EstimateInputs(query, key, mask, range(2), 0.2), [mpass.AShape(1, 64), mpass.AShape(1, 900)]
    )
    found = guarded(AttentionInputs(query, key, value, mask, 0.2), index, 0.2).index
    assert found.diagonal_count[0].tolist() == [ALL_DIAGONALS, int(index.diagonal_count[0, 1])]


def test_each_row_of_a_batch_is_judged_alone():
    query, key, value = random_attention(batch=2, num_queries=600, head_dim=DIM)
    query[1] = 0.0  # even attention, of which a local window loses most
    query[0] = 40 * key[0].repeat_interleave(2, 0)  # each query sees itself alone
    mask = AttentionMask()
    index = mpass.AShape.estimate(
        EstimateInputs(query, key, mask, range(4), 1.0), [mpass.AShape(1, 64)] * 4
    )
    found = guarded(AttentionInputs(query, key, value, mask, 1.0), index, 0.3).index
    assert bool((found.diagonal_count[0] == index.diagonal_count[0]).all())
    assert bool((found.diagonal_count[1] == ALL_DIAGONALS).all())


def test_a_row_that_is_padding_for_the_most_part_is_judged_by_its_text():
    query, key, value = random_attention(batch=3, num_queries=4096, head_dim=DIM)
    starts = torch.tensor([[0], [3900], [4096]])
    key_mask = torch.arange(4096) >= starts
    query[0] = 40 * key[0].repeat_interleave(2, 0)  # each query sees itself alone
    query[1] = 0.0  # even attention
    mask = AttentionMask(key_mask=key_mask)
    index = mpass.AShape.estimate(
        EstimateInputs(query, key, mask, range(4), 1.0), [mpass.AShape(1, 64)] * 4
    )
    inputs = AttentionInputs(query, key, value, mask, 1.0)
    for measured in (0, 48):
        found = guarded(inputs, index, 0.2, measured=measured)
        whole = (found.index.diagonal_count == ALL_DIAGONALS).all(1)
        assert whole.tolist() == [False, True, False]
        assert "may be" in found.why and found.losses is None


@pytest.mark.parametrize("size", [512, 200])
@pytest.mark.parametrize("prompt", ["uniform", "second half permuted", "hidden by neighbours"])
def test_a_promised_loss_holds_in_chunks(prompt, size):
    query, key, value = (each.contiguous() for each in PROMPTS[prompt][0]())
    patterns, total = [pattern_for_loss(0.01)] * HEADS, torch.zeros(HEADS, dtype=torch.float64)
    scores = query.double() @ key.double().mT * DIM**-0.5
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    for start in range(0, LENGTH, size):
        stop = min(LENGTH, start + size)
        mask = AttentionMask(query_offset=start)
        part = (query[:, :, start:stop], key[:, :, :stop])
        estimate = EstimateInputs(*part, mask, range(HEADS), DIM**-0.5)
        inputs = AttentionInputs(*part, value[:, :, :stop], mask, DIM**-0.5)
        index = guarded(inputs, Union.estimate(estimate, patterns), most_lost(0.01)).index
        sizes = {"batch": 1, "num_queries": stop - start, "num_keys": stop}
        cells = computed_mask(index, mask, **sizes)
        total += (weights[:, :, start:stop, :stop] * ~cells).sum((0, 2, 3))
    assert float(total.mean()) / LENGTH < OVER_ALL * most_lost(0.01)


@pytest.mark.parametrize(("queries", "rows"), [(1, 1), (300, 4), (1024, 8), (2048, 16), (9000, 16)])
def test_fewer_rows_are_looked_at_where_there_are_fewer_queries(queries, rows):
    assert rows_to_look_at(queries, 16) == rows


def test_rows_of_padding_and_heads_that_keep_all_are_not_what_is_lost():
    query, key, value = random_attention(batch=2, num_queries=300, head_dim=DIM)
    key_mask = torch.arange(300) >= torch.tensor([[0], [150]])
    for rows, mask in ((slice(0, 2), key_mask), (slice(1, 2), key_mask[1:])):
        visible = AttentionMask(key_mask=mask)
        own = (query[rows], key[rows], value[rows])
        inputs = AttentionInputs(*own, visible, DIM**-0.5)
        estimate = EstimateInputs(*own[:2], visible, range(4), DIM**-0.5)
        whole = Union.estimate(estimate, [Union(1.0, columns=0)] * 4)
        assert guarded(inputs, whole, 0.0001).why == ""
        part = Union.estimate(estimate, [Union(0.05, 1.0, 0, 0, 1, max_blocks=1)] * 4)
        assert guarded(inputs, part, 0.2).why


def test_less_may_be_lost_the_less_is_promised():
    losses = [0.001, 0.003, 0.01, 0.03, 0.1]
    patterns = [pattern_for_loss(loss) for loss in losses]
    assert sorted(patterns, key=lambda p: p.row_share) == patterns
    assert sorted(patterns, key=lambda p: -p.mass) == patterns
    shares = [most_lost(loss) for loss in losses]
    assert shares == sorted(shares)
    assert all(left_out(x) < most_lost(x) < 1 for x in losses)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_call_that_keeps_its_promise_gives_the_same_bits_with_and_without_guard():
    query, key, value = random_attention(heads=2, kv_heads=1, num_queries=512, head_dim=DIM)
    query = query * 3
    key, value = key.expand(1, 2, -1, -1), value.expand(1, 2, -1, -1)
    options = {"max_loss": 0.1, "dense_above": 2.0}
    compiled = compile_toy(Attention(), options)
    out, again = compiled(query, key, value), compiled(query, key, value)
    torch._dynamo.reset()
    named = compile_toy(Attention(), {"pattern": pattern_for_loss(0.1), "dense_above": 2.0})
    assert torch.equal(out, again)
    assert torch.equal(out, named(query, key, value))
    assert not torch.allclose(out, Attention()(query, key, value), atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_whose_patterns_a_user_names_are_not_guarded():
    query, key, value = hidden()
    config = mpass.SparseConfig(layers={0: {0: mpass.AShape(1, 64)}})
    model = OneLayer()
    compiled = compile_toy(model, {"max_loss": 0.01, "config": config, "dense_above": 2.0})
    with mpass.record() as log:
        compiled(query, key, value)
    assert mpass.last_report().sites[0].patterns == (
        "a_shape(1, 64)",
        str(pattern_for_loss(0.01)),
    )
    assert "dense" not in {call.lowering for call in log.calls}
