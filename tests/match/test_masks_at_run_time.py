"""Masks that no proof reads: made outside of the graph, or from values. Sparse where they allow it.

What runs is decided in each call by the mask itself, so the same graph must be right for any mask.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

import mpass
from mpass.lowering import dispatch
from mpass.lowering.recorder import record
from mpass.match import eager, sdpa
from mpass.validation import ValidationWarning
from tests.helpers.rotation import part_of_today
from tests.helpers.toys import EVERY_KEY, RecordingBackend
from tests.whole_models.test_prompts_in_parts import answer, build, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

N = 160
OPTIONS = {"pattern": EVERY_KEY, "dense_above": 2.0, "min_seq_len": 32}
SMALLEST = torch.finfo(torch.float32).min


def left_padded(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.cat([tokens(count, 1), tokens(count, 2)])
    mask = torch.ones_like(text)
    mask[1, :40] = 0
    return text, mask


def compiled(name: str):
    model = build(name)
    model.compile(backend="minference", options=OPTIONS | {"inner_backend": "eager"})
    return model


def lowerings(log) -> list[str]:
    return [call.lowering for call in log.calls]


# -- models of transformers ---------------------------------------------------------------------


def static(model, name: str):
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    if name == "left-padded":
        text, mask = left_padded(N)
        more = {"attention_mask": mask, "cache_implementation": "static"}
        return model.generate(text, **settings, **more)
    more = {"prefill_chunk_size": 50} if name == "chunks" else {}
    return answer(model, tokens(N, 3), cache_implementation="static", **more)


@pytest.mark.parametrize(
    ("model", "case", "calls"),
    part_of_today(
        [("llama", "left-padded", 2), ("llama", "chunks", 6), ("mistral", "plain", 2)], share=3
    ),
)
def test_static_caches_of_generate(model, case, calls):
    """generate() makes the mask of a static cache outside of the compiled forward.

    The last chunk is of 10 tokens, which stay dense.
    """
    expected = static(build(model), case)
    with record() as log:
        said = static(compiled(model), case)
    assert torch.equal(said, expected)
    assert lowerings(log) == ["cpu"] * calls


def test_a_mask_that_turns_out_to_see_both_ways_stays_dense_under_the_default():
    """The default is chosen for causal attention; who names a pattern gets it."""
    query, key, value = torch.randn(3, 1, 2, N, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, N, N, dtype=torch.bool)
    mask[..., -20:] = False
    seen = []
    for named in ({}, {"pattern": "union"}):
        torch._dynamo.reset()
        options = {"dense_above": 2.0, "min_seq_len": 32, "inner_backend": "eager"} | named
        attend = torch.compile(
            F.scaled_dot_product_attention, backend="minference", options=options
        )
        with record() as log:
            attend(query, key, value, mask)
        seen += lowerings(log)
    assert seen == ["dense", "cpu"]


POSITIONS = {
    "plain": torch.arange(N)[None],
    "packed": torch.cat([torch.arange(60), torch.arange(N - 60)])[None],
}


def test_positions_without_a_cache():
    """transformers looks for packed documents in position_ids; one graph serves both."""
    text = tokens(N, 4)
    plain, compiled_model = build("llama"), compiled("llama")
    for name, calls in (("plain", 2), ("packed", 4)):
        given = {"position_ids": POSITIONS[name], "use_cache": False}
        with record() as log:
            out = compiled_model(text, **given).logits
        torch.testing.assert_close(out, plain(text, **given).logits, atol=1e-4, rtol=1e-4)
        assert lowerings(log) == ["cpu"] * calls
    (report,) = mpass.reports()[-1:]
    assert "2 decided at run time" in report.summary()
    assert all(line.startswith("read at run time") for site in report.sites for line in site.mask)


# -- programs -----------------------------------------------------------------------------------


def with_sdpa(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def written_out(query, key, value, mask):
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    return torch.softmax(query @ key.mT * 0.25 + mask, -1) @ value


def two_layers(query, key, value, mask):
    return with_sdpa(with_sdpa(query, key, value, mask), key, value, mask)


def written_to(query, key, value, mask):
    first = with_sdpa(query, key, value, mask)
    mask.logical_and_(torch.ones(N, N, dtype=torch.bool).triu(-5))
    return with_sdpa(first, key, value, mask)


def tensors(batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, heads, N, 16) for heads in (4, 2, 2)]
    return [torch.randn(*size, generator=generator) for size in sizes]


def masks() -> dict[str, torch.Tensor]:
    causal = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
    pad = torch.ones(2, 1, 1, N, dtype=torch.bool)
    pad[0, ..., :30] = False
    random = torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.5
    return {
        "causal": causal.expand(2, 1, -1, -1).clone(),
        "padded": causal & pad,
        "window": (causal & causal.new_ones(N, N).triu(-20)).expand(2, 1, -1, -1).clone(),
        "random": random,
        "nothing": torch.zeros_like(random),
        "everything": torch.ones_like(random),
    }


KNOWN = {"causal", "padded", "window"}


@pytest.mark.parametrize(
    ("program", "hidden"),
    [(with_sdpa, None), (with_sdpa, SMALLEST), (written_out, SMALLEST), (written_out, -torch.inf)],
)
def test_one_graph_is_right_for_every_mask(program, hidden):
    backend = RecordingBackend(**OPTIONS)
    run = torch.compile(program, backend=backend)
    query, key, value = tensors()
    for name, seen in masks().items():
        mask = seen if hidden is None else torch.where(seen, 0.0, hidden)
        with torch.no_grad(), record() as log:
            out = run(query, key, value, mask)
        expected = program(query, key, value, mask)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4, equal_nan=True)
        assert lowerings(log) == (["cpu"] if name in KNOWN else ["dense"])
    assert len(backend.after) == 1


def test_a_mask_is_read_once_for_all_layers():
    backend = RecordingBackend(**OPTIONS)
    with torch.no_grad():
        torch.compile(two_layers, backend=backend)(*tensors(), masks()["causal"])
    assert backend.count("read_mask") == 1
    assert backend.count("masked_attention") == 2


def test_a_mask_that_is_written_to_stays_dense():
    """The op reads it at the output, and shares what it has read."""
    backend = RecordingBackend(**OPTIONS)
    mask = masks()["causal"]
    expected = written_to(*tensors(), mask.clone())
    with torch.no_grad():
        out = torch.compile(written_to, backend=backend)(*tensors(), mask)
    torch.testing.assert_close(out, expected)
    assert backend.count("masked_attention") == 0


def test_inductor_keeps_the_op():
    run = torch.compile(two_layers, backend="minference", options=OPTIONS)
    for name in ("padded", "random"):
        mask = masks()[name]
        with torch.no_grad(), record() as log:
            out = run(*tensors(), mask)
        torch.testing.assert_close(out, two_layers(*tensors(), mask), atol=1e-5, rtol=1e-4)
        assert lowerings(log) == (["cpu"] if name in KNOWN else ["dense"]) * 2


def test_one_mask_per_head_is_no_mask_to_read():
    backend = RecordingBackend(**OPTIONS)
    mask = masks()["causal"].expand(2, 4, N, N).clone()
    with torch.no_grad():
        torch.compile(with_sdpa, backend=backend)(*tensors(), mask)
    assert backend.count("masked_attention") == 0


def test_read_masks_can_be_switched_off():
    backend = RecordingBackend(**OPTIONS, read_masks=False)
    with torch.no_grad():
        torch.compile(with_sdpa, backend=backend)(*tensors(), masks()["causal"])
    assert backend.count("masked_attention") == 0
    assert "values are unknown when compiling" in mpass.last_report().summary()


def test_no_mask_is_read_where_the_host_would_wait_for_it(monkeypatch):
    waiting = dataclasses.replace(dispatch.device_lowering("cpu"), decides_by_cost=False)
    monkeypatch.setattr(dispatch, "_added", {"cpu": waiting})
    backend = RecordingBackend(**OPTIONS)
    with torch.no_grad():
        torch.compile(with_sdpa, backend=backend)(*tensors(), masks()["causal"])
    assert backend.count("read_mask") == backend.count("masked_attention") == 0
    assert "values are unknown when compiling" in mpass.last_report().summary()


def masked_fill(query, key, value, seen, hidden):
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    return (query @ key.mT * 0.25).masked_fill(seen == 0, hidden).softmax(-1) @ value


def where(query, key, value, seen, hidden):
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    return torch.where(seen.bool(), query @ key.mT * 0.25, hidden).softmax(-1) @ value


@pytest.mark.parametrize("hidden", [-torch.inf, SMALLEST])
@pytest.mark.parametrize("program", [masked_fill, where])
def test_a_buffer_that_says_which_scores_are_replaced(program, hidden):
    """As nanoGPT keeps its triangle; rows without keys are as the program leaves them."""
    backend = RecordingBackend(**OPTIONS, validate="full")
    run = torch.compile(program, backend=backend)
    for name, seen in masks().items():
        with torch.no_grad(), record() as log:
            out = run(*tensors(), seen.float(), hidden)
        expected = program(*tensors(), seen.float(), hidden)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4, equal_nan=True)
        assert lowerings(log) == (["cpu"] if name in KNOWN else ["dense"])
    assert len(backend.after) == 1


@pytest.mark.parametrize("program", [masked_fill, where])
def test_scores_replaced_by_a_number_that_may_count_stay_dense(program):
    backend = RecordingBackend(**OPTIONS)
    mask = masks()["nothing"].float()
    with torch.no_grad():
        out = torch.compile(program, backend=backend)(*tensors(), mask, -1e4)
    torch.testing.assert_close(out, program(*tensors(), mask, -1e4))
    assert backend.count("masked_attention") == 0


TRIANGLE = torch.ones(2 * N, 2 * N, dtype=torch.bool).tril()[None, None]


def rows_of_a_triangle(query, key, value, triangle, positions):
    """As litgpt takes the mask of a cache; torchtune indexes by positions of each batch row."""
    mask = triangle.index_select(2, positions)[..., : key.shape[2]]
    return with_sdpa(query, key, value, mask)


def rows_per_batch_row(query, key, value, triangle, positions):
    mask = triangle[0, 0][positions.expand(query.shape[0], -1), None, :].movedim(2, 1)
    return with_sdpa(query, key, value, mask[..., : key.shape[2]])


@pytest.mark.parametrize("program", [rows_of_a_triangle, rows_per_batch_row])
def test_rows_of_a_triangle_at_positions_that_are_an_input(program):
    """Every prefill with a cache: the positions in order are sparse, others dense and right."""
    backend = RecordingBackend(**OPTIONS)
    run = torch.compile(program, backend=backend)
    for positions, lowering in ((torch.arange(N), "cpu"), (torch.arange(N).flip(0), "dense")):
        with torch.no_grad(), record() as log:
            out = run(*tensors(), TRIANGLE, positions)
        expected = program(*tensors(), TRIANGLE, positions)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
        assert lowerings(log) == [lowering]
    assert len(backend.after) == 1


# -- validation ---------------------------------------------------------------------------------


def another(function):
    """A matcher that names the negated mask in the place of the mask."""

    def wrong(*args, **kwargs):
        mask = function(*args, **kwargs)
        if mask is None:
            return None
        with mask.graph.inserting_after(mask):
            other = mask.graph.call_function(torch.flip, (mask, (-1,)))
        other.meta["example_value"] = mask.meta["example_value"].flip(-1)
        return other

    return wrong


@pytest.mark.parametrize("program", [with_sdpa, written_out])
def test_validation_finds_a_wrong_mask(program, monkeypatch):
    monkeypatch.setenv("MPASS_STRICT", "")
    module, name = (sdpa, "readable_mask") if program is with_sdpa else (eager, "added_mask")
    monkeypatch.setattr(module, name, another(getattr(module, name)))
    backend = RecordingBackend(**OPTIONS)
    mask = torch.where(masks()["padded"], 0.0, SMALLEST)
    expected = program(*tensors(), mask)
    with torch.no_grad(), pytest.warns(ValidationWarning, match="a fault of mpass"):
        out = torch.compile(program, backend=backend)(*tensors(), mask)
    torch.testing.assert_close(out, expected)
    assert backend.count("masked_attention") == 0


def test_what_is_proven_is_not_read():
    def proven(query, key, value):
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        return with_sdpa(query, key, value, mask)

    backend = RecordingBackend(**OPTIONS)
    with torch.no_grad():
        torch.compile(proven, backend=backend)(*tensors())
    assert backend.count("sparse_attention") == 1
    assert backend.count("masked_attention") == 0
