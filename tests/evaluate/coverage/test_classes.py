"""`mpass coverage --kind`: what is counted, recorded and refused; some classes each day."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="builds models of transformers from config")

from mpass.cli.app import app
from mpass.errors import OptionValueError
from mpass.evaluate.classes import (
    ClassRecord,
    CountAttentions,
    append,
    cover_classes,
    kind_of_reason,
    line,
    read_records,
    summarise,
)
from mpass.evaluate.coverage import run_compiled
from mpass.models.class_table import NOT_BUILT
from mpass.models.classes import TURNS, ModelClass, model_classes
from tests.helpers.paths import ROOT
from tests.helpers.rotation import part_of_today

PACKAGES = ("PIL", "timm", "scipy")
"""What some classes need that tests do not install."""

SEEN_IN_PART = {"image-text:udop"}
"""Classes of which the matcher does not see every attention."""


RECORDS = read_records(ROOT / "benchmarks" / "results" / "classes.jsonl")
"""What became of each class when its page was written."""

SECONDS = {record.name: record.seconds for record in RECORDS}

BY_SECONDS = sorted(model_classes(), key=lambda entry: (SECONDS.get(entry.name, 0.0), entry.name))
"""So that a tenth of them takes as long on each day."""


@pytest.mark.parametrize("entry", part_of_today(BY_SECONDS, 10), ids=lambda entry: entry.name)
def test_a_class_equals_eager(entry, plain_torch):
    """A tenth of all classes each day, so that ten days see every one."""
    for record in cover_classes([entry], only=("no_cache",)):
        if record.not_run:
            known = entry.model_type in NOT_BUILT or any(p in record.not_run for p in PACKAGES)
            assert known, record.not_run
            pytest.skip(record.not_run)
        assert record.equal, line(record)
        assert record.sites >= record.attentions or entry.name in SEEN_IN_PART, line(record)
        before = [known for known in RECORDS if known.name == entry.name]
        assert all(record.sparse >= known.sparse for known in before), line(record)


OTHERS = ("no_cache_left", "dynamic_chunk", "static_prefill", "static_chunk", TURNS.name)
"""How classes run beside `no_cache`; `dynamic_prefill` has no more in it than these."""

RUNS = [(entry, name) for entry in model_classes(("causal",)) for name in OTHERS]

QUICK = {name for name, seconds in SECONDS.items() if seconds < 8}
"""Classes that do not take long to compile, as those with a scan in plain torch do."""


def run_name(part: ModelClass | str) -> str:
    return part if isinstance(part, str) else part.name


def check_run(entry: ModelClass, scenario: str) -> None:
    """A class in one scenario is as eager, and as sparse as it is without a cache."""
    for record in cover_classes([entry], only=(scenario,)):
        if record.not_run:
            pytest.skip(record.not_run)
        assert record.equal, line(record)
        known = {other.name for other in RECORDS if other.dense or other.not_run}
        assert not record.dense or entry.name in known, line(record)


@pytest.mark.parametrize(
    ("entry", "scenario"),
    part_of_today([run for run in RUNS if run[0].name in QUICK], 113),
    ids=run_name,
)
def test_caches_and_turns_are_as_sparse_as_prompts(entry, scenario, plain_torch):
    check_run(entry, scenario)


@pytest.mark.slow
@pytest.mark.parametrize(("entry", "scenario"), RUNS, ids=run_name)
def test_caches_and_turns_of_every_class(entry, scenario, plain_torch):
    check_run(entry, scenario)


def test_attentions_over_the_whole_prompt_are_counted():
    query = torch.randn(1, 2, 8, 4)
    with CountAttentions(8, 8) as counted:
        functional.scaled_dot_product_attention(query, query, query)
        functional.scaled_dot_product_attention(query[:, :, :1], query, query)
        (query @ query.mT).softmax(-1)
        functional.softmax(torch.randn(8, 8), dim=-1)  # of a router: no heads
    assert counted.count == 2


class Breaks(torch.nn.Module):
    """Two layers alike, in each of which Dynamo's graph breaks before its attention."""

    def forward(self, x):
        for _ in range(2):
            x = self.layer(x)
        return (x,)

    def layer(self, x):
        torch._dynamo.graph_break()
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_an_attention_whose_graph_serves_two_layers_is_counted_for_both(fresh_dynamo, plain_torch):
    with torch.no_grad():
        run = run_compiled(Breaks(), {"x": torch.randn(1, 2, 16, 8)})
    assert (len(run.sites), run.again) == (1, 1)


def test_a_run_goes_on_where_its_file_ends(tmp_path):
    output = tmp_path / "classes.jsonl"
    options = ["coverage", "--kind", "causal", "--model-type", "gpt2", "--scenario", "no_cache"]
    first = CliRunner().invoke(app, [*options, "--output", str(output)])
    assert first.exit_code == 0, first.output
    assert "causal: 1 of 1 classes run, 2 of 2 attentions sparse, 0 differ" in first.output
    (record,) = read_records(output)
    assert record.equal and record.sparse == record.attentions == 2
    again = CliRunner().invoke(app, [*options, "--output", str(output)])
    assert again.exit_code == 0 and len(read_records(output)) == 1
    options[-1] = "no_cache_left"
    more = CliRunner().invoke(app, [*options, "--output", str(output)])
    assert more.exit_code == 0, more.output
    assert [r.scenario for r in read_records(output)] == ["no_cache", "no_cache_left"]


def test_records_are_summed_up(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [
        ClassRecord("causal", "a", "A", "no_cache", attentions=2, sites=2, sparse=1),
        ClassRecord("causal", "b", "B", "no_cache"),
        ClassRecord("causal", "c", "C", "no_cache", attentions=1, sites=1, difference=1.0),
        ClassRecord("causal", "d", "D", not_run="needs audio"),
    ]
    append(records, path)
    (summary,) = summarise(read_records(path))
    assert (summary.classes, summary.run) == (4, 3)
    assert (summary.attentions, summary.sparse) == (3, 1)
    assert summary.differ == ("causal:c",) and summary.without == ("causal:b",)


def test_reasons_are_counted_without_their_places():
    reason = "exp: this op is not understood at /x/site-packages/modeling_a.py:297, in forward; z"
    assert kind_of_reason(reason) == "exp: this op is not understood; z"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--kind", "decoder"), ("--part", "11/10"), ("--model-type", "lama"), ("--scenario", "x")],
)
def test_unknown_names_are_refused(option, value):
    result = CliRunner().invoke(app, ["coverage", "--kind", "causal", option, value])
    assert isinstance(result.exception, OptionValueError) and value in str(result.exception)
