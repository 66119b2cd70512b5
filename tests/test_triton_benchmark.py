"""The GPU benchmark where there is no GPU: it says so, and its dry run is right."""

from __future__ import annotations

import json

import pytest
import torch
from mpass.lowering import reference
from mpass.lowering.index import AttentionMask

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.inputs import computed_flops, dense_index, list_index


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


def test_flops_count_the_tiles_that_are_computed():
    query = torch.empty(1, 2, 256, 8)
    sizes = {"batch": 1, "num_queries": 256, "num_keys": 256}
    for index in (dense_index(query), list_index(query, 0.5)):
        cells = reference.computed_mask(index, AttentionMask(causal=False), **sizes)
        assert computed_flops(index, 256, 8) == 4 * 8 * int(cells.sum())
