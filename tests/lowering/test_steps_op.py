"""Whole steps: dense attention, the part of the selected keys in it, and each cell only once."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering import cpu, triton
from mpass.lowering.device import REFERENCE
from mpass.lowering.index import AttentionMask, IndexWidth
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.steps_op import whole_step
from tests.helpers.requirements import needs_package
from tests.helpers.triton_cases import SLOTS, padding, random_index
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention

needs_triton = needs_package("triton", "Triton is not installed")

LOWERINGS = {"reference": REFERENCE, "cpu": cpu.LOWERING, "triton": triton.LOWERING}


@pytest.mark.parametrize("form", ["lists", "diagonals"])
@pytest.mark.parametrize("kind", ["plain", "padding", "columns", "sinks", "bf16"])
@pytest.mark.parametrize(
    "lowering", ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
)
def test_a_whole_step_is_dense_and_knows_the_part_of_the_selected_keys(lowering, kind, form):
    if lowering == "triton" and (kind, form) not in (("plain", "lists"), ("sinks", "diagonals")):
        pytest.skip("two kinds are interpreted")
    if lowering == "cpu" and kind == "bf16":
        pytest.skip("its log-sum-exps are held elsewhere")
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    query, key, value = random_attention(2, 4, 2, 150, head_dim=16, dtype=dtype)
    mask = AttentionMask(causal=False, key_mask=padding(2, 150) if kind == "padding" else None)
    sizes = {"batch": 2, "num_queries": 150, "num_keys": 150}
    width = IndexWidth(2, 2, 30 if kind == "columns" else 0)
    index = random_index(SLOTS[form], mask, width=width, seed=3, **sizes)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if kind == "sinks" else None
    inputs = AttentionInputs(query, key, value, mask, 0.2, sink_logits=sinks)

    whole = whole_step(LOWERINGS[lowering], inputs, index, ratio=True)

    cells = reference.computed_mask(index, mask, **sizes)
    positions = torch.arange(150)
    every = reference.allowed_cells(mask, positions, 150).expand_as(cells)
    wide = [t.double() for t in (query, key, value)]
    scores = wide[0] @ reference.repeat_kv(wide[1], 4).mT * 0.2
    sums = [scores.masked_fill(~seen, -torch.inf).exp().sum(-1) for seen in (cells, every)]
    if sinks is not None:
        sums = [part + sinks.double().exp()[:, None] for part in sums]
    share = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0)
    outputs = [
        (scores.exp() * seen / total.clamp(min=1e-30)[..., None]) @ reference.repeat_kv(wide[2], 4)
        for seen, total in zip((cells, every), sums, strict=True)
    ]
    for out, true in zip((whole.sparse, whole.full), outputs, strict=True):
        assert (out.double() - true).abs().max() < TOLERANCE[dtype]
    assert (whole.ratio.double() - share).abs().max() < TOLERANCE[dtype]
    plain = whole_step(LOWERINGS[lowering], inputs, index, ratio=False)
    assert plain.ratio is None
    assert (plain.full - whole.full).abs().max() < TOLERANCE[dtype]


def test_cells_of_a_whole_step_are_computed_once():
    query, key, value = random_attention(1, 2, 2, 150, head_dim=16)
    mask = AttentionMask(causal=False)
    sizes = {"batch": 1, "num_queries": 150, "num_keys": 150}
    index = random_index(SLOTS["diagonals"][:2], mask, width=IndexWidth(2, 2, 0), seed=3, **sizes)
    walked = []

    class Counting:
        @staticmethod
        def sparse_attention_lse(inputs, own):
            walked.append(reference.computed_mask(own, mask, **sizes))
            return REFERENCE.sparse_attention_lse(inputs, own)

    out = whole_step(Counting, AttentionInputs(query, key, value, mask, 0.2), index, ratio=False)
    assert torch.equal(walked[0].int() + walked[1].int(), torch.ones_like(walked[0]).int())
    true = dense_attention(query, key, value, torch.ones(1, 2, 150, 150, dtype=torch.bool), 0.2)
    assert (out.full.double() - true).abs().max() < 1e-5
