"""What attention keeps over the steps of a sampler: whole steps, those between them, and resets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import mpass
from mpass.errors import ArgumentError, DenoisingMemoryError, OptionValueError
from mpass.lowering.denoising import Schedule
from mpass.options import parse_options
from tests.helpers.denoising_model import OPTIONS, TOKENS, Model, distance, noise
from tests.helpers.truth import random_attention


@pytest.mark.parametrize(
    ("settings", "full", "kept"),
    [
        ({"steps": 8, "full": 2, "every": 3}, [0, 1, 4, 7], [1, 4]),
        ({"steps": 8, "full": 2, "every": 3, "order": 1}, [0, 1, 4, 7], [0, 1, 4]),
        ({"steps": 6, "full": 2, "every": 1}, range(6), []),
        ({"steps": 6, "full": 9, "every": 2}, range(6), []),
        ({"steps": 6, "full": 1, "every": 9}, [0], [0]),
        ({"steps": 6, "full": 1, "every": 9, "keep": "nothing"}, [0], []),
    ],
    ids=str,
)
def test_steps_that_are_whole_and_those_of_which_something_is_kept(settings, full, kept):
    schedule = Schedule(**settings)
    assert [s for s in range(schedule.steps) if schedule.is_full(s)] == list(full)
    assert [s for s in range(schedule.steps) if schedule.is_kept(s)] == list(kept)
    assert schedule.is_full(schedule.steps) and not schedule.is_kept(schedule.steps)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="minference", options=OPTIONS)


@torch.no_grad()
def sample(model, run=None, steps=10, calls=1):
    """A sampler: batch rows in so many calls of the model per step."""
    x = noise(2)
    for _ in run.over(range(steps)) if run else range(steps):
        x = x - 0.05 * torch.cat([model(part) for part in x.chunk(calls)])
    return x


def test_one_graph_serves_all_steps_and_the_residual_is_worth_it(model, compiled):
    dense = sample(model)
    errors = {}
    counters.clear()
    for keep in ("residual", "nothing"):
        with mpass.denoising(10, full=2, every=4, keep=keep) as run, mpass.record() as log:
            errors[keep] = distance(sample(compiled, run), dense)
        densities = [float(call.density.mean()) for call in log.calls[::2]]
        assert [share == 1 for share in densities] == [s in (0, 1, 5, 9) for s in range(10)]
        assert all(call.lowering != "dense" for call in log.calls[4:10])
    assert counters["stats"]["unique_graphs"] == 1
    assert 0 < errors["residual"] < errors["nothing"] / 2


def test_two_runs_give_the_same_bits(compiled):
    results = []
    for _ in range(2):
        with mpass.denoising(6, full=2, every=3) as run:
            results.append(sample(compiled, run, 6))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "settings",
    [{}, {"order": 1}, {"ratio": True, "decay": 0.0}, {"keep": "output"}],
    ids=str,
)
def test_where_nothing_changes_steps_between_are_dense_attention(model, compiled, settings):
    x = noise()
    with torch.no_grad(), mpass.denoising(8, full=2, every=4, **settings) as run:
        dense = model(x)
        for _ in run.over(range(8)):
            assert (compiled(x) - dense).abs().max() < 1e-5


def test_a_slope_carries_what_is_kept_on(compiled):
    x, other = noise(), noise(seed=2)
    with torch.no_grad():
        errors = []
        for order in (0, 1):
            with mpass.denoising(4, full=2, every=9, keep="output", order=order) as run:
                run.begin()
                first = compiled(x)
                run.advance()
                second = compiled(torch.lerp(x, other, 0.01))
                run.advance()
                errors.append(distance(compiled(torch.lerp(x, other, 0.02)), 2 * second - first))
    assert errors[1] < errors[0] / 2


def test_the_ratio_scales_the_selected_part_and_decays():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = random_attention(1, 2, 2, TOKENS, head_dim=16)
    f = torch.compile(attention, backend="minference", options=OPTIONS)
    with mpass.denoising(4, full=1, every=9, ratio=True, decay=0.1) as run:
        run.begin()
        dense = f(q, k, v)
        (kept,) = run.kept.values()
        ratio = kept.ratio.clone()
        run.advance()
        run.advance()
        out = f(q, k, v)
    sparse = mpass.sparse_attention(q, k, v, pattern="a_shape(0, 64)", is_causal=False)
    scaled = (ratio + 0.2).clamp(max=1)[..., None] * sparse
    expected = scaled + dense - ratio[..., None] * sparse
    assert (out - expected).abs().max() < 1e-5
    assert 0.05 < ratio.mean() < 0.95


def test_guidance_as_two_calls_keeps_each_its_own(compiled):
    results = []
    for calls in (1, 2):
        with mpass.denoising(6, full=1, every=9) as run:
            results.append(sample(compiled, run, 6, calls))
        assert len(run.kept) == 2 * calls
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_layers_and_models_that_share_a_graph_keep_each_their_own():
    torch._dynamo.reset()
    torch.manual_seed(0)
    first, second, x = Model().eval(), Model().eval(), noise()
    with torch.no_grad():
        dense = [model(x) for model in (first, second)]
        for model in (first, second):
            for layer in model.layers:
                layer.compile(backend="minference", options=OPTIONS)
        counters.clear()
        with mpass.denoising(6, full=1, every=9) as run:
            for step in run.over(range(6)):
                place = step // 3  # the second takes over in the middle, as of high and low noise
                out = (first, second)[place](x)
                assert (out - dense[place]).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert len(run.kept) == 4


def test_other_shapes_and_a_new_prompt_start_whole(model, compiled):
    x, longer = noise(), noise(tokens=TOKENS + 64)
    with torch.no_grad(), mpass.denoising(8, full=1, every=9) as run:
        run.begin()
        for given, whole in ((x, True), (x, False), (longer, True), (longer, False)):
            with mpass.record() as log:
                out = compiled(given)
            assert all((call.lowering == "dense") == whole for call in log.calls)
            assert (out - model(given)).abs().max() < 1e-5
            run.advance()
        run.forget()
        with mpass.record() as log:
            compiled(longer)
        assert {call.lowering for call in log.calls} == {"dense"}
        run.begin()
        assert run.step == 0 and run.num_bytes == 0


class Scheduler:
    """What is asked of a scheduler of diffusers."""

    def set_timesteps(self, steps):
        self.timesteps = range(steps)

    def step(self, x, velocity):
        return x - 0.05 * velocity


def test_a_scheduler_tells_the_steps_and_each_prompt_begins_anew(compiled):
    scheduler, states = Scheduler(), []
    with torch.no_grad(), mpass.denoising(5, full=1, every=9, scheduler=scheduler) as run:
        for _ in range(2):
            scheduler.set_timesteps(5)
            x = noise()
            for _ in scheduler.timesteps:
                states.append(run.step)
                x = scheduler.step(x, compiled(x))
    assert states == [*range(5)] * 2
    assert "step" not in vars(scheduler)
    with (
        pytest.raises(ArgumentError, match="scheduler"),
        mpass.denoising(5, scheduler=object()),
    ):
        pass


def test_what_would_be_kept_is_told_before_it_is_over_the_limit(compiled):
    with (
        torch.no_grad(),
        mpass.denoising(6, full=2, every=9, memory=1000) as run,
        pytest.raises(DenoisingMemoryError, match=r"51,200 bytes for the 2 attentions.*memory=51"),
    ):
        for _ in run.over(range(6)):
            compiled(noise())
    assert run.step == 1 and run.num_bytes == 0
    with mpass.denoising(6, full=2, every=9, memory=51200) as run, torch.no_grad():
        for _ in run.over(range(6)):
            compiled(noise())
    index = sum(kept.index.num_bytes() for kept in run.kept.values())
    assert run.num_bytes == 51200 + index


def test_without_a_run_or_a_step_attention_is_dense(model, compiled):
    x = noise()
    with torch.no_grad(), mpass.record() as log:
        dense = compiled(x)
        with pytest.warns(UserWarning, match="nobody told a step"), mpass.denoising(5):
            untold = compiled(x)
        assert {call.lowering for call in log.calls} == {"dense"}
        assert "outside of mpass.denoising" in log.calls[0].reason
        assert torch.equal(dense, untold)
        assert torch.allclose(dense, model(x), atol=1e-6)


def test_attention_that_is_too_dense_to_gain_stays_dense_at_every_step():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = random_attention(1, 2, 2, TOKENS, head_dim=16)
    f = torch.compile(attention, backend="minference", options=OPTIONS | {"dense_above": 0.1})
    with mpass.denoising(4, full=1, every=9) as run, mpass.record() as log:
        for _ in run.over(range(4)):
            f(q, k, v)
    assert {call.lowering for call in log.calls} == {"dense"}
    assert "of the work" in log.calls[-1].reason and run.num_bytes == 0


def test_causal_attention_is_as_without_the_option():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = random_attention(1, 2, 2, TOKENS, head_dim=16)
    f = torch.compile(attention, backend="minference", options=OPTIONS)
    with mpass.record() as log:
        out = f(q, k, v)
    assert log.calls[0].lowering != "dense"
    sparse = mpass.sparse_attention(q, k, v, pattern="a_shape(0, 64)")
    assert (out - sparse).abs().max() < 1e-5


def test_a_mask_that_is_read_at_run_time_stays_dense():
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q, k, v = random_attention(1, 2, 2, TOKENS, head_dim=16)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.compile(attention, backend="minference", options=OPTIONS)(q, k, v, mask)
    reason = mpass.last_report().sites[0].reason
    assert reason.startswith("what is kept over denoising steps needs a proven mask: mask is not p")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 4.5},
        {"every": 0},
        {"full": True},
        {"keep": "all"},
        {"order": 2},
        {"ratio": 1},
        {"ratio": True, "order": 1},
        {"decay": "much"},
        {"memory": -1},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(wrong):
    with (
        pytest.raises(ArgumentError, match=next(iter(wrong))),
        mpass.denoising(**({"steps": 5} | wrong)),
    ):
        pass


def test_the_option_is_true_or_false_and_not_with_means():
    for wrong in ({"denoising": 1}, {"denoising": True, "summaries": 16}):
        with pytest.raises(OptionValueError, match="denoising"):
            parse_options(None, wrong)
