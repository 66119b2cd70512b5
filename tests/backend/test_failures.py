"""A failure of mpass itself keeps attention dense and tells how to report it."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import mpass
import mpass.backend
import mpass.plan
import mpass.rewrite
from mpass import failures
from mpass.lowering.dispatch import find_lowering
from mpass.lowering.index import AttentionMask, IndexWidth, diagonal_slots, whole_index
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.ops import ATTENTION, OverIndex, attend
from mpass.lowering.recorder import record
from mpass.lowering.reference.attention import allowed_cells
from mpass.match import eager, sdpa
from tests.helpers.cpu_cases import needs_kernels
from tests.helpers.toys import Decoder, compile_toy
from tests.helpers.truth import dense_attention, random_attention

FULL = {"pattern": mpass.VerticalSlash(1, 1 << 20), "dense_above": 2.0}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Broken(Exception):
    pass


def breaks(*_args, **_kwargs):
    raise Broken("something of ours")


@pytest.fixture
def users(monkeypatch):
    """Failures are contained, as for users, and none was reported before."""
    monkeypatch.setenv(failures.VARIABLE, "0")
    monkeypatch.setattr(failures, "_reported", set())


PLACES = {
    "matching": (sdpa, "reason_to_stay"),
    "gradients": (sdpa, "gradient_reason"),
    "planning": (mpass.plan, "resolve_site"),
    "warming up": (mpass.backend, "start_kernels"),
    "inserting": (mpass.rewrite, "insert_index"),
    "propagating": (mpass.rewrite, "propagate"),
    "comparing": (mpass.rewrite, "difference"),
    "dropping": (mpass.rewrite, "remove_dead"),
}


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_failure_leaves_the_graph_as_it_was_and_warns_once(place, users, monkeypatch):
    monkeypatch.setattr(*PLACES[place], breaks)
    model, x = Decoder().eval(), torch.randn(1, 200, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = compile_toy(model, FULL)(x)
    assert torch.equal(out, model(x))
    assert [site.status for site in mpass.last_report().sites] == ["dense"] * 3
    assert "Broken: something of ours" in mpass.last_report().sites[0].reason
    texts = [str(w.message) for w in caught if w.category is failures.InternalErrorWarning]
    assert len(texts) == 1
    for words in ("Broken: something of ours", "in breaks", torch.__version__, "ops of the graph"):
        assert words in texts[0]


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_strict_raises(place, monkeypatch):
    monkeypatch.setattr(*PLACES[place], breaks)
    with pytest.raises(Exception, match="something of ours"):
        compile_toy(Decoder().eval(), FULL)(torch.randn(1, 200, 32))


@torch.no_grad()
def test_one_site_that_fails_does_not_keep_others_dense(users, monkeypatch):
    calls = iter([False, True, False])
    whole = mpass.rewrite.insert_index

    def breaks_once(*args):
        return breaks() if next(calls) else whole(*args)

    monkeypatch.setattr(mpass.rewrite, "insert_index", breaks_once)
    model, x = Decoder().eval(), torch.randn(1, 200, 32)
    with pytest.warns(failures.InternalErrorWarning):
        out = compile_toy(model, FULL)(x)
    assert torch.allclose(out, model(x), atol=1e-5)
    assert [site.status for site in mpass.last_report().sites] == ["sparse", "dense", "sparse"]


@torch.no_grad()
def test_what_runs_falls_back_to_dense_attention(users, monkeypatch):
    model, x = Decoder().eval(), torch.randn(1, 200, 32)
    monkeypatch.setattr(mpass.VerticalSlash, "estimate", breaks)
    with pytest.warns(failures.InternalErrorWarning, match="estimation of vertical_slash"):
        out = compile_toy(model, FULL)(x)
    assert torch.allclose(out, model(x), atol=1e-5)


def test_errors_of_users_and_of_memory_pass(users):
    for error in (mpass.MpassError("x"), MemoryError(), torch.OutOfMemoryError("x")):
        with pytest.raises(type(error)):
            failures.contain(error, "a test")


@torch.no_grad()
def test_written_out_attention_that_fails_is_reported(users, monkeypatch):
    monkeypatch.setattr(eager, "build_site", breaks)

    def program(x):
        return torch.softmax(x @ x.mT, -1) @ x

    x = torch.randn(1, 2, 200, 16)
    with pytest.warns(failures.InternalErrorWarning, match="matching attention"):
        out = compile_toy(program, FULL)(x)
    assert torch.equal(out, program(x))
    (site,) = mpass.last_report().sites
    assert site.reason.startswith("mpass failed in matching attention (eager)")


RUNNING = {
    "a kernel that cannot be built": ("mpass.lowering.cpu.attention.load_library", "a kernel of"),
    "a kernel that raises": ("mpass.lowering.cpu.attention.run_attention", "a kernel of"),
    "an estimator that cannot be built": (
        "mpass.lowering.cpu.estimators.load_library",
        "the estimation of vertical_slash",
    ),
    "the choice": ("mpass.lowering.ops.decide_dense", "choosing sparse or dense"),
    "the crossover": ("mpass.patterns.base.op.reason_for_dense", "the estimation of"),
}
"""What fails while a compiled program runs, and what is said to have failed."""


@needs_kernels
@pytest.mark.parametrize("place", RUNNING)
@torch.no_grad()
def test_what_fails_at_run_time_gives_dense_results_and_is_recorded(place, users, monkeypatch):
    target, words = RUNNING[place]
    model, x = Decoder().eval(), torch.randn(1, 200, 32)
    compiled = compile_toy(model, FULL)
    compiled(x)
    monkeypatch.setattr(target, breaks)
    with warnings.catch_warnings(record=True) as caught, record() as log:
        warnings.simplefilter("always")
        out = compiled(x)
    assert torch.allclose(out, model(x), atol=1e-5)
    texts = [str(w.message) for w in caught if w.category is failures.InternalErrorWarning]
    assert len(texts) == 1 and words in texts[0] and "in breaks" in texts[0]
    assert len(log.calls) == 3
    for call in log.calls:
        assert call.reason.startswith(f"mpass failed in {words}")
        assert bool((call.density == 1).all())
        assert call.lowering == ("cpu" if "estimation" in words else "dense")


@needs_kernels
@pytest.mark.parametrize("place", RUNNING)
@torch.no_grad()
def test_strict_raises_what_fails_at_run_time(place, monkeypatch):
    compiled, x = compile_toy(Decoder().eval(), FULL), torch.randn(1, 200, 32)
    compiled(x)
    monkeypatch.setattr(RUNNING[place][0], breaks)
    with pytest.raises(Broken, match="something of ours"), record() as log:
        compiled(x)
    assert log.calls == []


@needs_kernels
@torch.no_grad()
def test_dense_attention_that_fails_is_computed_by_torch(users, monkeypatch):
    """Short prompts run dense on kernels of ours, too."""
    query, key, value = random_attention(num_queries=300)
    given = AttentionInputs(query, key, value, AttentionMask(window=70), 0.2)
    index = whole_index(query, 5, IndexWidth(), diagonal_slots(4))
    broken = dataclasses.replace(find_lowering("cpu"), dense_attention=breaks)
    monkeypatch.setattr("mpass.lowering.ops.choose_lowering", lambda _inputs: broken)
    call = OverIndex(given, index, dense_above=2.0, min_seq_len=1000, layer=-1, site=0)
    with pytest.warns(failures.InternalErrorWarning, match="a kernel of dense attention"):
        done = attend(call, ATTENTION)
    out = done.result
    assert done.reason.startswith("mpass failed in a kernel of dense attention")
    cells = allowed_cells(given.mask, torch.arange(300), 300)
    assert torch.allclose(out.double(), dense_attention(query, key, value, cells, 0.2), atol=1e-5)
