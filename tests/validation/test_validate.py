"""Proofs that do not hold are found while compiling, whatever rule or matcher made them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import mpass
from mpass.failures import is_strict
from mpass.graph.site import MaskMeaning
from mpass.masks import prover
from mpass.match import find_attention
from mpass.validation import ValidationWarning
from mpass.validation.slices import NotRunError, Run, part_of
from mpass.validation.validate import EFFORTS, Validator
from tests.helpers.toys import compile_toy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

N = 256
FULL = mpass.VerticalSlash(1, 1 << 20)
OPTIONS = {"pattern": FULL, "dense_above": 2.0, "min_seq_len": 16}


def tensors(batch=2, n=N):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 4, n, 16, generator=generator) for _ in range(3)]


def pads():
    pad = torch.ones(2, N, dtype=torch.int64)
    pad[0, -20:] = 0
    return pad


def with_sdpa(query, key, value, pad):
    mask = torch.ones(N, N, dtype=torch.bool).tril() & (pad > 0)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask)


def with_float_mask(query, key, value, pad):
    mask = torch.zeros(N, N).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, mask)


def written_out(query, key, value, pad):
    seen = torch.ones(N, N, dtype=torch.bool).tril() & (pad > 0)[:, None, None]
    scores = (query @ key.mT * 0.3).masked_fill(~seen, torch.finfo(query.dtype).min)
    return torch.softmax(scores, -1) @ value


def written_in_place(query, key, value, pad):
    scores = query @ key.mT * 0.3
    scores.masked_fill_(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    return torch.softmax(scores, -1) @ value


def with_flex(query, key, value, blocks):
    return flex_attention(query, key, value, block_mask=blocks)


PROGRAMS = [with_sdpa, with_float_mask, written_out, written_in_place]


@pytest.fixture
def wrong_proofs(monkeypatch):
    """Every proof says that there is a window of 100 too."""

    def wrong(*args):
        return replace(original(*args), window=100)

    original = prover.assemble
    monkeypatch.setattr(prover, "assemble", wrong)


@pytest.mark.parametrize("program", PROGRAMS)
@torch.no_grad()
def test_wrong_proof_is_an_error_in_tests(program, wrong_proofs):
    with pytest.raises(BackendCompilerFailed, match=r"(?s)ValidationError.*ops: .*proof: "):
        compile_toy(program, OPTIONS)(*tensors(), pads())


@pytest.mark.parametrize("program", PROGRAMS)
@torch.no_grad()
def test_users_get_the_dense_result_and_a_report_to_paste(program, wrong_proofs, monkeypatch):
    monkeypatch.setenv("MPASS_STRICT", "0")
    inputs = (*tensors(), pads())
    with pytest.warns(ValidationWarning, match=r"(?s)proof: .*\[0, .*the graph has.*torch 2"):
        out = compile_toy(program, OPTIONS)(*inputs)
    (site,) = mpass.last_report().sites
    assert site.status == "dense" and "fault of mpass" in site.reason
    assert torch.allclose(out, program(*inputs), atol=1e-5)


@torch.no_grad()
def test_wrong_mask_mod_is_found(wrong_proofs, monkeypatch):
    monkeypatch.setattr("mpass.match.flex_attention.agree_with_lists", lambda *_: "", raising=False)
    blocks = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < 40), None, None, N, N, "cpu")
    gms = []
    torch.compile(with_flex, backend=lambda gm, _: gms.append(gm) or gm)(*tensors(), blocks)
    sites = find_attention(gms[0])
    claimed = replace(sites[0].mask or MaskMeaning(True), causal=True, window=39)
    validator = Validator(gms[0], EFFORTS["sample"])
    right = replace(claimed, window=40)
    assert validator.difference(replace(sites[0], mask=right)) is None
    assert validator.difference(replace(sites[0], mask=claimed)).what == "mask_mod"


@torch.no_grad()
def test_wrong_scale_is_found(monkeypatch):
    from mpass.match import eager

    def wrong(*arguments):
        scores = original(*arguments)
        return replace(scores, scale=scores.scale * 1.01)

    original = eager.read_scores
    monkeypatch.setattr(eager, "read_scores", wrong)
    with pytest.raises(BackendCompilerFailed, match="differs: scores"):
        compile_toy(written_out, OPTIONS)(*tensors(), pads())


@torch.no_grad()
def test_off_checks_nothing(wrong_proofs):
    compile_toy(with_sdpa, OPTIONS | {"validate": "off"})(*tensors(), pads())
    assert mpass.last_report().sparse_sites


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("effort", ["sample", "full"])
@torch.no_grad()
def test_right_proofs_are_looked_at_and_stay(program, effort, caplog):
    caplog.set_level(logging.DEBUG, logger="mpass.validation")
    before = torch.get_rng_state()
    inputs = (*tensors(), pads())
    kept = [x.clone() for x in inputs]
    out = compile_toy(program, OPTIONS | {"validate": effort})(*inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, inputs, kept))
    assert mpass.last_report().sparse_sites
    assert torch.allclose(out, program(*inputs), atol=1e-5)
    missed = [each.message for each in caplog.records if "not validated" in each.message]
    assert missed == []


class StopError(Exception):
    pass


def validator_of(function, *inputs, effort="sample"):
    """The sites of a function and their validator; nothing is run."""
    found = []

    def backend(gm, _inputs):
        sites = find_attention(gm)
        guards = [list(v.node.shape_env.guards) for v in sizes(gm)]
        validator = Validator(gm, EFFORTS[effort])
        differences = [validator.difference(site) for site in sites]
        assert guards == [list(v.node.shape_env.guards) for v in sizes(gm)], "guards were added"
        found.append((sites, validator, differences))
        raise StopError

    def sizes(gm):
        values = (node.meta.get("example_value") for node in gm.graph.nodes)
        return [value for value in values if isinstance(value, torch.SymInt)][:1]

    with torch.no_grad(), pytest.raises(BackendCompilerFailed):
        torch.compile(function, backend=backend)(*inputs)
    return found[0]


def long_mask(query, key, value, pad):
    n = query.shape[2]
    at = torch.arange(n)
    seen = (at[None] <= at[:, None])[None, None] & pad.bool()[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, seen)


def long_written_out(query, key, value, pad):
    n = query.shape[2]
    at = torch.arange(n)
    hidden = torch.where(at[None] <= at[:, None], 0.0, -torch.inf)[None, None]
    return torch.softmax(query @ key.mT * 0.25 + hidden, -1) @ value


@pytest.mark.parametrize("program", [long_mask, long_written_out])
def test_masks_of_long_prompts_are_looked_at_in_strips(program, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="mpass.validation")
    n = 131072
    inputs = [torch.randn(1, 1, n, 16) for _ in range(3)] + [torch.ones(1, n, dtype=torch.int64)]
    largest = []
    call = Run._call

    def watched(self, node):
        value = call(self, node)
        largest.append(value.numel() if isinstance(value, torch.Tensor) else 0)
        return value

    monkeypatch.setattr(Run, "_call", watched)
    _, validator, differences = validator_of(program, *inputs)
    assert differences == [None] and len(validator.known) == 1
    assert not [each for each in caplog.records if "not validated" in each.message]
    assert max(largest) <= 16 * n


@pytest.mark.parametrize("program", [long_mask, long_written_out])
def test_a_difference_in_a_strip_is_found(program, wrong_proofs):
    inputs = [*tensors(1, 4096), torch.ones(1, 4096, dtype=torch.int64)]
    _, _, differences = validator_of(program, *inputs)
    assert differences[0] is not None and differences[0].count > 0


def test_dynamic_sizes_take_their_hints_without_a_guard():
    x = tensors(1, 300)[0]
    torch._dynamo.mark_dynamic(x, 2)
    sites, validator, differences = validator_of(lambda x: long_written_out(x, x, x, None), x)
    assert isinstance(sites[0].query.meta["example_value"].shape[2], torch.SymInt)
    assert sites[0].mask is not None, sites[0].unproven
    assert differences == [None] and validator.known


def test_layers_that_compute_the_same_are_checked_once():
    def stack(query, key, value, pad):
        n = query.shape[2]
        at = torch.arange(n)
        hidden = torch.where(at[None] <= at[:, None], 0.0, -torch.inf)[None, None]
        for _ in range(6):
            query = torch.softmax(query @ key.mT * 0.25 + hidden, -1) @ value
        return query

    sites, validator, _ = validator_of(stack, *tensors(1, 1024), torch.ones(1, 1024))
    assert len(sites) == 6 and len(validator.known) == 1


def test_a_large_number_in_some_cells_is_no_difference_in_others():
    """fp32 rounds a score beside it by more than the other scores of the row may differ."""

    def program(query, key, value, pad):
        scores = query @ key.mT * 0.25 + torch.full((N, N), -8999.0).triu(1)
        return torch.softmax(scores, -1) @ value

    sites, _, differences = validator_of(program, *tensors(), pads())
    assert sites[0].read_mask is not None
    assert differences == [None]


def test_unknown_writer_without_result_is_run():
    """An op that is not known to write runs too if nothing uses its result."""

    def program(query, key, value, pad):
        mask = torch.ones(N, N, dtype=torch.int32).tril()
        torch._foreach_mul_([mask[:, :10]], 0)
        return F.scaled_dot_product_attention(query, key, value, mask.bool())

    sites, _, differences = validator_of(program, *tensors(), pads())
    assert sites[0].mask is None or differences[0] is not None


def test_what_fails_while_it_runs_is_left_as_it_was(monkeypatch):
    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("mpass.validation.slices.call", broken)
    _, _, differences = validator_of(with_sdpa, *tensors(), pads())
    assert differences == [None]


def test_large_tensors_are_not_computed_whole():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.sort, (x,))
    z = graph.call_function(torch.sin, (x,))
    for node in (x, y, z):
        node.meta["example_value"] = torch.empty(100, 100)
    output = graph.output(z)
    from mpass.graph.writes import StorageWrites

    run = Run(part_of([z], {}, output, StorageWrites(graph)), {x: torch.ones(100, 100)}, 100, 10)
    with pytest.raises(NotRunError, match="too large"):
        run.whole(z)


def test_strict_mode_is_on_in_tests_and_off_for_users(monkeypatch):
    assert is_strict() and os.environ["MPASS_STRICT"] == "1"
    monkeypatch.delenv("MPASS_STRICT")
    assert not is_strict()
