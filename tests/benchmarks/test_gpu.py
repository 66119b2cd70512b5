"""The GPU benchmark where there is no GPU: it says so, and its dry run is right."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import densities, sanitize
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.check import relative_error
from benchmarks.gpu.check_long import check_long
from benchmarks.gpu.first import MODEL, PLAN, chosen
from benchmarks.gpu.inputs import Shape, computed_flops, dense_index, list_index, planted_tensors
from benchmarks.gpu.sections import ESTIMATORS, all_work
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.summary import goals
from benchmarks.gpu.training import worst_block
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference import attention as reference

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_ends_with_one_line(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "GPU" in out


def test_dry_run_checks_kernels_and_goes_on_from_its_file(tmp_path, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--smoke", "--only", "check/plain", "--out", str(path)]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["ok"] for row in rows.values()] == [True]
    assert main(arguments) == 0
    assert json.loads(path.read_text())["rows"] == rows
    assert "checks: 1 of 1 right" in capsys.readouterr().out


def smoke(path, only):
    """Rows of a dry run of some sections."""
    assert main(["--smoke", "--only", only, "--out", str(path)]) == 0
    return json.loads(path.read_text())["rows"]


def test_dry_run_compiles_the_model_for_both_backends(tmp_path):
    rows = smoke(tmp_path / "rows.json", "prefill/")  # a rule of FlexPrefill's has that in its name
    rows = {name: row for name, row in rows.items() if name.startswith("prefill/")}
    assert set(rows) == {"prefill/minference/130", "prefill/inductor/130"}
    assert all(row["ms"] > 0 for row in rows.values())


def test_dry_run_measures_estimation_and_the_attention_after_it(tmp_path):
    (row,) = smoke(tmp_path / "rows.json", "estimation/x_attention").values()
    assert row["share"] == row["ms"] / row["attention_ms"] and row["index_share_of_kv"] > 0


def test_dry_run_of_training_checks_gradients_and_times_a_step(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["first", "--smoke", "--out", str(path), "--workers", "1"]
    names = ["--checks", "check/training block top k/.*", "--plan", "training/(block.*2|sdpa)/130"]
    assert main([*arguments, *names]) == 0
    rows = json.loads(path.read_text())["rows"]
    check = rows.pop("check/training block top k/float32/32")
    assert check["ok"] and check["repeats"] and check["key_block"] < 1e-5
    assert set(rows) == {"training/block top k 0.2/130", "training/sdpa/130"}
    assert all(row["ms"] > 0 and row["forward_ms"] > 0 for row in rows.values())


def test_a_wrong_block_of_a_gradient_is_seen():
    truth = torch.ones(1, 2, 640, 4)
    found = truth.double()
    found[0, 1, 70:74] = 0
    assert (found - truth).norm() / truth.norm() < 0.08 < 0.2 < worst_block(found, truth)
    assert worst_block(truth, truth) == 0.0


@pytest.mark.slow
def test_dry_run_of_every_section_has_a_figure_or_a_reason_in_every_row(tmp_path):
    rows = smoke(tmp_path / "rows.json", "/130")
    sections = {name.split("/")[0] for name in rows}
    timed = {"attention", "estimation", "whole", "capture", "crossover", "prefill"}
    assert sections == timed | {"layer", "training"}
    assert not [(name, row) for name, row in rows.items() if "error" in row]


@pytest.mark.parametrize("density", [0.01, 0.3, 0.7, 1.0])
def test_random_lists_have_the_density_asked_for(density):
    query = torch.empty(1, 2, 2000, 8)
    index = list_index(query, density)
    rows = index.block_count.shape[2]
    for head in range(2):
        for row in range(rows):
            count = int(index.block_count[0, head, row])
            entries = index.block_index[0, head, row, :count].tolist()
            assert entries == sorted(set(entries)) and entries[-1] == row
            assert count == max(1, -(-int(density * 1000 * (row + 1)) // 1000))


def test_lists_take_a_density_for_each_head():
    index = list_index(torch.empty(1, 3, 6400, 8), [0.1, 0.5, 1.0])
    shares = index.block_count[0].sum(-1) / (100 * 101 / 2)
    assert (shares - torch.tensor([0.1, 0.5, 1.0])).abs().max() < 0.02


def test_recorded_densities_are_spread_over_the_heads(tmp_path, monkeypatch):
    rows = {"2048": {"densities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, "8192": {"densities": [0.05]}}
    path = tmp_path / "densities.json"
    monkeypatch.setattr(densities, "PATH", path)
    assert densities.recorded() == []
    path.write_text(json.dumps({"patterns": {"union": rows}}))
    assert densities.load_densities("union", 1000, 3) == (0.2, 0.4, 0.6)
    assert densities.load_densities("union", 10**6, 2) == (0.05, 0.05)
    assert densities.recorded() == []
    rows["2048"]["adjacent"] = 0.5
    path.write_text(json.dumps({"patterns": {"union": rows, "a_shape": {"2048": {}}}}))
    assert densities.recorded() == ["union"]


def test_adjacent_entries_of_lists_are_counted():
    index = list_index(torch.empty(1, 1, 640, 8), 1.0)
    assert densities.adjacent_share(index) == [1.0]
    index.block_index[0, 0, :, :4] = torch.tensor([0, 2, 4, 5])
    index.block_count.fill_(4)
    assert abs(densities.adjacent_share(index)[0] - 1 / 3) < 1e-6


def test_goals_are_held_against_the_rows_that_are_there():
    rows = {
        "attention/density 1/131072": {"ms": 200.0, "tflops": 400.0},
        "attention/density 0.05/131072": {"ms": 12.0, "tflops": 310.0},
        "attention/flash/131072": {"ms": 220.0},
        "attention/cudnn/131072": {"error": "not built"},
        "whole/block top k 0.05/131072": {"ms": 20.0},
        "crossover/1024": {"slowdown": 1.05},
        "prefill/minference/131072": {"ms": 5000.0},
        "prefill/inductor/131072": {"skipped": "too long"},
        "capture/union/1024": {"ms": 1.0, "difference": 0.0, "ok": True},
    }
    found = {goal: (round(value, 3), met) for goal, value, met in goals(rows)}
    assert found == {
        "131072: TFLOP/s at density 0.05": (310.0, True),
        "131072: rate at density 0.05 over that at 1": (0.775, False),
        "131072: whole op at density 0.05 over SDPA": (11.0, True),
        "1024: time of the compiled default over inductor's": (1.05, False),
        "capture/union/1024: difference of the replayed graph": (0.0, True),
    }


def test_flops_count_the_tiles_that_are_computed():
    query = torch.empty(1, 2, 256, 8)
    sizes = {"batch": 1, "num_queries": 256, "num_keys": 256}
    lists = list_index(query, 0.5)
    shared = dataclasses.replace(lists, head_slots=(1, 1))
    for index in (dense_index(query), lists, shared):
        cells = reference.computed_mask(index, AttentionMask(), **sizes)
        tiles = cells.unflatten(3, (-1, 64)).unflatten(2, (-1, 64)).any(-1).any(3)
        assert computed_flops(index, 256, 8) == 4 * 8 * int(tiles.sum()) * 64 * 64


def test_first_run_checks_in_processes_of_their_own_and_flushes_rows(tmp_path, capfd):
    """The row of a check comes from a worker; a second call measures nothing again."""
    path = tmp_path / "rows.json"
    arguments = ["first", "--smoke", "--out", str(path), "--workers", "1"]
    arguments += ["--plan", "machine/copy", "whole/block top k 0.05/130"]
    assert main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows["check/long block top k/131"]["repeats"]
    assert rows["machine/copy"]["tb_per_s"] > 0 and "whole/block top k 0.05/130" in rows
    assert main([*arguments, "--workers", "0"]) == 0
    assert json.loads(path.read_text())["rows"] == rows
    assert "checks: 1 of 1 right" in capfd.readouterr().out


def test_every_name_of_the_plan_is_a_piece_of_work():
    """A name that nothing matches would be left out on the one day that a GPU is there."""
    setting = Setting(
        torch.device("cpu"), smoke=False, lengths=(131072, 32768, 1048576), planted=True
    )
    assert len(list(all_work(setting))) > 100
    for pattern in (*PLAN, *MODEL):
        long = pattern.replace("8192)", "131072)").replace("2048)", "131072)")
        long = long.rsplit("/", 1)[0] + "/(131072|32768|1048576|8192|4096|1024)"
        assert chosen(setting, [long if pattern.rsplit("/", 1)[-1] != ".*" else pattern]), pattern


def test_a_wrong_long_layer_is_seen(monkeypatch):
    """One key too many in a late row changes it by less than rounding changes an early one."""
    setting = Setting(torch.device("cpu"), smoke=True, lengths=(), planted=True)
    estimate = ESTIMATORS["block top k"]

    def one_block_less(query, key):
        index = estimate(query, key)
        index.block_count[0, 1, -1] -= 1
        return index

    assert check_long(setting, 300, estimate)["ok"]
    calls = iter([estimate, one_block_less])
    assert not check_long(setting, 300, lambda q, k: next(calls)(q, k))["ok"]


def test_relative_error_is_of_the_worst_block_and_counts_what_is_no_number():
    truth = torch.ones(1, 2, 130, 4)
    out = truth.clone()
    out[0, 1, 129] = 1.01
    assert relative_error(out, truth) == pytest.approx(0.01 / 2**0.5, rel=1e-3)
    out[0, 0, 3, 0] = float("nan")
    assert relative_error(out, truth) == float("inf")
    assert relative_error(torch.zeros(1, 64, 4), torch.zeros(1, 64, 4)) == 0.0
    assert relative_error(torch.full((1, 64, 4), 1e-3), torch.zeros(1, 64, 4)) > 1


def test_planted_inputs_are_sparse_and_random_ones_are_not():
    """What the default keeps of 4096 tokens of each."""
    import mpass

    shape = Shape(4096, heads=4, kv_heads=1, head_dim=64, dtype=torch.float32)
    kept = [
        float(mpass.density(query, key, pattern="union").mean())
        for query, key, _ in (
            planted_tensors(shape, torch.device("cpu")),
            shape.tensors(torch.device("cpu")),
        )
    ]
    assert kept[0] < 0.6 < kept[1]


@pytest.mark.parametrize(
    ("out", "ok"),
    [
        ("checks: 1 of 1 right\n========= ERROR SUMMARY: 0 errors", True),
        ("checks: 1 of 1 right\n========= ERROR SUMMARY: 3 errors", False),
        ("checks: 0 of 1 right\n========= ERROR SUMMARY: 0 errors", False),
        ("checks: 1 of 1 right\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)", True),
        ("========= RACECHECK SUMMARY: 12 hazards displayed (12 errors)", False),
        ("Segmentation fault", False),
    ],
)
def test_a_tool_that_found_something_or_did_not_end_is_no_success(out, ok):
    assert sanitize.row_of(out, 0)["ok"] is ok


def test_sanitizing_without_the_program_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *_, **__: None)
    assert main(["sanitize", "--out", str(tmp_path / "rows.json")]) == 2
    assert "compute-sanitizer" in capsys.readouterr().out


@pytest.mark.xdist_group("wheel")  # builds in one folder
def test_first_run_starts_from_a_wheel_where_no_checkout_is_in_the_way(tmp_path):
    """As on a bare machine: a wheel, `python -P`, the benchmarks linked, no jsonschema."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "path" / "jsonschema.py").write_text("raise ImportError('not on this machine')")
    run = [sys.executable, "-P", "-m", "benchmarks.gpu", "first", "--smoke", "--workers", "1"]
    done = subprocess.run(
        [*run, "--out", str(tmp_path / "rows.json"), "--plan", "whole/block top k 0.05/130"],
        cwd=ROOT,  # whose own mpass/ is no whole package
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'path'}:{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows["check/long block top k/131"]["ok"] and "whole/block top k 0.05/130" in rows
