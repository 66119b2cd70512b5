"""Model families end to end: with full budgets every output equals eager (fp32, 1e-4).

The default run takes one prefill of every family and every scenario of two, a third of them each
day; the whole matrix is marked slow.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="builds models of transformers from config")

from mpass.backend import minference
from mpass.evaluate.coverage import FULL_BUDGET, cover
from mpass.models.tiny import (
    BY_NAME,
    FAMILIES,
    LENGTH,
    SCENARIOS,
    build,
    inputs,
    padding,
    scenarios,
)
from tests.helpers.rotation import part_of_today

BY_SCENARIO = {scenario.name: scenario for scenario in SCENARIOS}

REASONS = (
    "bias",
    "not known to be a mask",
    "chunked attention",
    "one query: there is nothing to skip",
    "known at run time only",
    "values are unknown when compiling",
    "sparse from 8 on",
    "queries may stand after the last key",
    "known only at run time",
)
"""What a site may stay dense for: biases, chunks, decoding, positions that are tensors."""

PARTLY = {"bloom", "llama4", "whisper"}
"""Families with attention that no sparse op serves: ALiBi, chunks, cross."""

QUICK = part_of_today(
    [
        (family.name, family.implementations[0], "no_cache_left" if family.kind != "image" else "")
        for family in FAMILIES
    ]
    + [
        (name, implementation, scenario.name)
        for name, implementation in (("llama", "sdpa"), ("gemma3", "eager"))
        for scenario in SCENARIOS
    ],
    share=3,
)


def check(name: str, implementation: str, scenario: str) -> None:
    family = BY_NAME[name]
    model = build(family, implementation)
    record = cover(family, model, implementation, BY_SCENARIO[scenario or "no_cache"])
    assert not record.error, record.error
    assert record.difference <= 1e-4, record
    assert record.sites > 0
    for reason in record.dense:
        assert any(known in reason for known in REASONS), reason
    if name not in PARTLY and BY_SCENARIO[record.scenario].cached == 0:
        assert record.rewritten == record.sites, record.dense


@pytest.mark.parametrize(("name", "implementation", "scenario"), QUICK)
def test_family_equals_eager(name, implementation, scenario):
    check(name, implementation, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_spelling_and_scenario_equals_eager(family, request):
    if "slow" not in (request.config.getoption("-m") or ""):
        pytest.skip("the whole matrix takes half an hour: pytest -m slow tests/match")
    for implementation in family.implementations:
        for scenario in scenarios(family):
            if implementation != "flex_attention":
                check(family.name, implementation, scenario.name)


def test_flex_attention_of_transformers_equals_eager():
    check("llama", "flex_attention", "dynamic_prefill")


@pytest.mark.slow
def test_flex_attention_over_packed_positions_stays_dense():
    family = BY_NAME["llama"]
    model = build(family, "flex_attention")
    record = cover(family, model, "flex_attention", BY_SCENARIO["no_cache"])
    assert record.equal and record.rewritten == 0
    assert all("values are unknown when compiling" in reason for reason in record.dense)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_masks_that_were_proven_are_not_built(name, implementation):
    family = BY_NAME[name]
    model = build(family, implementation)
    graphs = []

    def backend(gm, example_inputs):
        compiled = minference(gm, example_inputs, options=FULL_BUDGET)
        graphs.append(gm)
        return compiled

    call = inputs(family, model, BY_SCENARIO["no_cache_left"])
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**call)
    (gm,) = graphs
    square = [
        node.name
        for node in gm.graph.nodes
        if isinstance(value := node.meta.get("example_value"), torch.Tensor)
        and tuple(value.shape[-2:]) == (LENGTH, LENGTH)
    ]
    assert square == []


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_gemma2_with_a_static_cache_equals_eager(side):
    """The prefill of a static cache: more keys than there are tokens, and layers with a window."""
    from transformers import StaticCache

    model = build(BY_NAME["gemma2"], "eager")
    compiled = torch.compile(model, backend="minference", options=FULL_BUDGET)
    torch._dynamo.reset()
    ids = torch.randint(3, 90, (2, 72), generator=torch.Generator().manual_seed(0))
    results = []
    for call in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=96)
        given = {"attention_mask": padding(side, 2, 72), "past_key_values": cache}
        results.append(call(ids, **given, cache_position=torch.arange(72)).logits)
    real = padding(side, 2, 72).bool()
    assert torch.allclose(results[0][real], results[1][real], atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_t5_with_padding_equals_eager(implementation):
    """Prompts and continuations are padded on their own; one prompt is nothing but padding."""
    family = BY_NAME["t5"]
    if implementation not in family.implementations:
        pytest.skip(f"t5 has no {implementation} attention")
    model = build(family, implementation)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (3, 72), generator=generator)
    mask, decoder_mask = padding("right", 3, 72), padding("left", 3, 72)
    mask[1] = 0
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    given |= {"decoder_attention_mask": decoder_mask, "use_cache": False}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="minference", options=FULL_BUDGET)
    expected, found = model(**given)[0], compiled(**given)[0]
    real = decoder_mask.bool()
    assert torch.allclose(expected[real], found[real], atol=1e-4)
