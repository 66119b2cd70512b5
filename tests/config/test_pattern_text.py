"""Patterns in the words of reports: what differs from the defaults, spans of heads and layers."""

from __future__ import annotations

import dataclasses

import pytest

import mpass
from mpass.config.pattern_text import parse_pattern, short_form
from mpass.config.spans import in_spans
from mpass.inspection.text_table import patterns_of_heads
from mpass.patterns.base import registered_patterns
from mpass.report import Report, SiteReport

EXAMPLES = [
    pattern
    for cls in registered_patterns().values()
    for pattern in (cls(), *cls.examples(), *cls.candidates())
]


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_short_form_is_read_as_the_same_pattern(pattern):
    assert parse_pattern(short_form(str(pattern))) == pattern
    assert len(short_form(str(type(pattern)()))) == len(pattern.name)


def test_short_form_names_the_fields_that_differ():
    assert short_form("union(0.9, 0.018, 128)") == "union(mass=0.9, columns=128)"
    assert short_form("pattern_of_another_machine(1, 2)") == "pattern_of_another_machine(1, 2)"


def test_patterns_of_heads_are_spans():
    shape = str(mpass.AShape(64))
    assert patterns_of_heads(["union"] * 9) == "union"
    assert patterns_of_heads([shape, shape, "dense()", shape]) == (
        "a_shape(sink_size=64) heads 0-1, 3; dense head 2"
    )
    assert in_spans([0, 1, 2, 7, 9, 10]) == "0-2, 7, 9-10"


SITE = SiteReport(0, "model.layers.0.attn", 4, 2, 8, "sparse", "", ("union",) * 4, "", (), "")


def sites_of_layers(numbers, **different):
    return [
        dataclasses.replace(SITE, layer=n, path=f"model.layers.{n}.attn", **different)
        for n in numbers
    ]


def rows_of(sites):
    lines = str(Report(tuple(sites), 0)).splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_layers_alike_are_one_row_of_a_report():
    sites = [*sites_of_layers(range(30)), *sites_of_layers([30, 31], patterns=("dense",) * 4)]
    sites[7] = dataclasses.replace(sites[7], status="dense", reason="its mask", patterns=())
    assert [(row[0], row[1], row[6]) for row in rows_of(sites)] == [
        ("0-6, 8-29", "model.layers.*.attn", "union"),
        ("7", "model.layers.7.attn", "its mask"),
        ("30-31", "model.layers.*.attn", "dense"),
    ]


def test_sites_that_no_layer_tells_apart_stay_rows_of_their_own():
    unknown = dataclasses.replace(SITE, layer=-1, path="attn")
    twice = sites_of_layers([3, 3])
    assert [row[0] for row in rows_of([unknown, unknown, *twice])] == ["-", "-", "3", "3"]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("vertical_slash", mpass.VerticalSlash()),
        ("vertical_slash(100, 200)", mpass.VerticalSlash(100, 200)),
        ("vertical_slash(slash_size=200)", mpass.VerticalSlash(slash_size=200)),
        ("block_sparse(5, block_size=128)", mpass.BlockSparse(5, 128)),
        (" dense ", mpass.Dense()),
    ],
)
def test_patterns_are_read_from_text(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern
