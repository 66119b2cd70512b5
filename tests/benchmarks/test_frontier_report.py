"""Tables of the frontier: the worst text decides, and patterns are compared at equal density."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.frontier_report import (
    curves_of,
    draw,
    interpolate,
    settings_of,
    show,
    table_at_densities,
    table_of_settings,
)


def line(text, pattern, *, density=1.0, seconds=10.0, loss=0.0, last=0.0):
    return {
        "model": "toy",
        "length": 4096,
        "text": text,
        "pattern": pattern,
        "density": density,
        "index_seconds": 0.0 if pattern == "dense" else 0.25 * seconds,
        "attention_seconds": seconds if pattern == "dense" else 0.75 * seconds,
        "estimation_share": 0.0 if pattern == "dense" else 0.25,
        "dense": 2.0,
        "sparse": 2.0 + loss,
        "dense_quarters": [2.0, 2.0, 2.0, 2.0],
        "sparse_quarters": [2.0, 2.0, 2.0, 2.0 + last],
        "error": 0.001,
    }


@pytest.fixture
def lines():
    return [
        line("code", "dense"),
        line("alice", "dense", seconds=30.0),
        line("code", "union", density=0.2, seconds=2.0, loss=0.004, last=0.002),
        line("alice", "union", density=0.3, seconds=4.0, loss=0.008, last=0.012),
        line("code", "union(mass=0.9)", density=0.4, seconds=3.0, loss=0.001, last=0.001),
        line("alice", "union(mass=0.9)", density=0.5, seconds=5.0, loss=0.003, last=0.002),
        line("code", "a_shape", density=0.1, seconds=1.0, loss=0.5, last=0.9),
        line("alice", "a_shape", density=0.1, seconds=1.0, loss=0.4, last=0.8),
    ]


def test_settings_are_ordered_by_cost_and_judged_by_their_worst_text(lines):
    a_shape, union, wide = settings_of(lines)
    assert (a_shape.pattern, union.pattern, wide.name) == ("a_shape", "union", "union")
    assert union.cost == pytest.approx(6 / 40) and union.texts == 2
    assert union.density == pytest.approx(0.25) and union.estimation_share == 0.25
    assert union.loss == pytest.approx(0.008) and union.mean_loss == pytest.approx(0.006)
    assert union.last_quarter == pytest.approx(0.012)
    assert [item.gate for item in (a_shape, union, wide)] == [False, False, True]


def test_patterns_are_compared_at_equal_density(lines):
    settings = settings_of(lines)
    curve = curves_of(settings)["union"]
    assert interpolate(curve, 0.35) == pytest.approx((0.006 + 0.002) / 2)
    assert interpolate(curve, 0.1) is None and interpolate(curve, 0.6) is None
    header, _, *rows = table_at_densities(settings).splitlines()
    place = header.split(" | ").index("30%")
    cells = {row.split(" | ")[0]: row.split(" | ")[place] for row in rows}
    assert cells == {"| union": "+0.0050", "| a_shape": ""}


def test_a_curve_leaves_out_settings_that_a_sparser_one_beats(lines):
    lines += [line(t, "union(rows=1)", density=0.35, loss=0.02) for t in ("code", "alice")]
    assert len(curves_of(settings_of(lines))["union"]) == 2


def test_pictures_and_tables_are_made_of_every_model_and_length(lines, tmp_path, capsys):
    lines += [item | {"length": 8192} for item in lines]
    show(lines, tmp_path / "frontier")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"frontier_toy_{length}_{what}.svg"
        for length in (4096, 8192)
        for what in ("cost", "density")
    ]
    shown = capsys.readouterr().out
    assert "toy, 8192 tokens" in shown and table_of_settings(settings_of(lines[:8])) in shown
    picture = ElementTree.fromstring(draw(settings_of(lines[:8]), "title", by_cost=True))
    titles = [element.text for element in picture.iter() if element.tag.endswith("title")]
    assert any(title.startswith("union(mass=0.9): 45.0%") for title in titles)
