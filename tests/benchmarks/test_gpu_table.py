"""The tables of docs/gpu.md: what is predicted beside what was measured, and what was not."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import table
from benchmarks.gpu.table import BEGIN, END, NOTHING, PAGE, Measured, load_results, page_part
from mpass.lowering.triton.chips import CHIPS

H100 = CHIPS["h100"]
KERNELS = {"sparse_attention": 2.0, "plan_rows": 0.125, "gather_columns": 0.125}
ROWS = {
    "attention/cudnn/32768": {"ms": 15.0},
    "attention/density 0.05/131072": {"ms": 21.5},
    "layer/union/32768": {"replayed_ms": 5.0, "work": 0.25, "host_us": 800.0, "kernels": KERNELS},
    "crossover/2048": {"slowdown": 20.9},
    "crossover/16384": {"slowdown": 0.875, "chosen": "sparse"},
    "crossover/plain inputs/16384": {"slowdown": 1.011, "chosen": "dense"},
}


@pytest.fixture
def folder(tmp_path):
    """Results of a made-up run, and files that are none of this chip's."""
    versions = {"torch": "2.99", "triton": "3.99", "smoke": False}
    for name, device, rows in (
        ("gpu_a.json", "NVIDIA H100 80GB HBM3", ROWS),
        ("gpu_b.json", "NVIDIA B200", {"attention/cudnn/32768": {"ms": 99.0}}),
        ("other.json", "NVIDIA H100", {"attention/cudnn/32768": {"ms": 99.0}}),
    ):
        about = versions | {"device": device}
        (tmp_path / name).write_text(json.dumps({"about": about, "rows": rows}))
    (tmp_path / "gpu_variants.json").write_text('{"lists 0.05": {"ms": 1.0}}')
    return tmp_path


def line(folder, start):
    (found,) = [row for row in page_part([H100], folder).splitlines() if row.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_measured_figures_stand_beside_the_predicted_ones(folder):
    cells = line(folder, "| `union` 32K")
    assert cells[1] == "25.0%"
    seen = [cell.split(" / ")[-1] for cell in cells[2:8]]
    assert seen == ["15.0", "2.75", "0.25", "2.00", "3.00x", "0.80"]
    assert line(folder, "| 128K")[2].endswith(" / 21.5")


def test_what_was_not_measured_says_so(folder):
    cells = line(folder, "| `union` 128K")
    assert all(cell.endswith(f" / {NOTHING}") for cell in cells[2:8])
    assert "NVIDIA H100 80GB HBM3, torch 2.99, Triton 3.99" in page_part([H100], folder)
    alone = page_part([CHIPS["a100"]], folder)
    assert "The rates are assumed. No GPU of this kind was measured." in alone


def test_crossovers_from_before_the_guard_are_not_shown(folder):
    part = page_part([H100], folder)
    assert "20.9" not in part
    assert "/ 0.88 (sparse) | 1.00 / 1.01 (dense) |" in part


def test_ratios_say_how_far_the_model_is_from_the_clock(folder, capsys):
    assert table.main(["--chips", "h100", "--results", str(folder), "--ratios"]) == 0
    said = capsys.readouterr().out
    parts = ("estimation", "plan and gather", "attention", "host", "dense")
    assert [f"h100, {part}: measured over predicted" in said for part in parts] == [True] * 5


def test_a_page_keeps_all_but_what_stands_between_its_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert table.with_tables(page, "new\n") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


def test_the_documentation_has_the_tables_of_the_results():
    """Otherwise: python -m benchmarks.gpu.table --write."""
    part = page_part([CHIPS[name] for name in table.SHOWN])
    page = PAGE.read_text()
    assert page == table.with_tables(page, part)


def test_a_figure_is_read_only_where_it_is():
    measured = Measured({"a": {"ms": 1}, "b": {"error": "no"}}, "")
    assert measured.figure("a") == 1.0
    assert measured.figure("b") is None and measured.figure("c") is None
    assert load_results(CHIPS["mi300x"]).about == ""
