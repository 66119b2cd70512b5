"""A failure of mpass itself keeps attention dense and tells how to report it."""

from __future__ import annotations

import warnings

import pytest
import torch

import mpass
import mpass.backend
import mpass.plan
import mpass.rewrite
from mpass import failures
from mpass.match import eager, sdpa
from tests.helpers.toys import Decoder, compile_toy

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
    "propagating": (mpass.rewrite, "run_fake"),
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
