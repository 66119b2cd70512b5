"""Generated Triton source: golden texts, the module cache, and the table of tiles.

`MPASS_ACCEPT=1 pytest tests/lowering/triton/compiled/test_source.py` rewrites the folder `golden`.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.triton import attention, source
from mpass.lowering.triton.attention import entry_form, row_form
from mpass.lowering.triton.spec import (
    FEATURES,
    SELECT_TILE,
    TARGETS,
    TritonKernelSpec,
    attention_tile,
    pack_warps,
    parts,
    query_heads_per_program,
    target_of,
)
from mpass.lowering.triton.support import unsupported
from tests.helpers.golden import assert_golden
from tests.helpers.processes import run_python

GOLDEN = Path(__file__).parent / "golden"

ATTENTION = TritonKernelSpec("attention", head_dim=128, value_dim=128, num_stages=3)
EVERYTHING = dataclasses.replace(
    ATTENTION,
    form="mixed",
    head_dim=96,
    value_dim=72,
    tile=32,
    columns=True,
    window=True,
    padding=True,
    softcap=True,
    sinks=True,
    target="sm_80",
)
SPECS = {
    "attention_lists": ATTENTION,
    "attention_lists_packed": dataclasses.replace(ATTENTION, pack=2, num_warps=8),
    "attention_diagonals_columns_packed": dataclasses.replace(
        ATTENTION, form="diagonals", columns=True, pack=2, num_warps=8
    ),
    "attention_diagonals_columns": dataclasses.replace(ATTENTION, form="diagonals", columns=True),
    "attention_mixed_everything": EVERYTHING,
    "attention_bidirectional": dataclasses.replace(ATTENTION, causal=False, padding=True),
    "query_gradients": dataclasses.replace(ATTENTION, template="query_gradients", num_stages=2),
    "query_gradients_everything": dataclasses.replace(EVERYTHING, template="query_gradients"),
    "key_gradients": dataclasses.replace(ATTENTION, template="key_gradients", tile=32),
    "key_gradients_diagonals": dataclasses.replace(
        ATTENTION, template="key_gradients", form="diagonals", causal=False, num_stages=2
    ),
    "column_gradients": dataclasses.replace(ATTENTION, template="column_gradients", tile=32),
    "column_gradients_everything": dataclasses.replace(EVERYTHING, template="column_gradients"),
    "key_gradients_everything": dataclasses.replace(EVERYTHING, template="key_gradients"),
    "turned_lists": TritonKernelSpec("turned", num_warps=1),
    "turned_mixed_window": TritonKernelSpec(
        "turned", form="mixed", causal=False, window=True, num_warps=1
    ),
    "rows_lists": TritonKernelSpec("rows", num_warps=1),
    "rows_mixed_everything": TritonKernelSpec(
        "rows", form="mixed", columns=True, window=True, padding=True, num_warps=1
    ),
    "columns": TritonKernelSpec("columns", head_dim=80, value_dim=128),
    "listed": TritonKernelSpec(
        "listed", head_dim=64, value_dim=64, tile=32, window=True, padding=True, softcap=True
    ),
    "last_queries": TritonKernelSpec("last_queries", head_dim=128, num_stages=2),
    "last_queries_masked": TritonKernelSpec(
        "last_queries", dtype="fp16", head_dim=80, window=True, padding=True, num_stages=2
    ),
    "select": TritonKernelSpec("select", tile=1024),
    "pool": TritonKernelSpec("pool", head_dim=128, pool=64),
    "pool_masked": TritonKernelSpec("pool", head_dim=80, pool=8, padding=True),
    "pool_int8": TritonKernelSpec("pool", head_dim=80, pool=8, int8=True, padding=True),
    "tile_scores": TritonKernelSpec("tile_scores", head_dim=128, num_stages=2),
    "tile_scores_masked": TritonKernelSpec(
        "tile_scores", dtype="fp16", head_dim=80, window=True, padding=True, num_stages=2
    ),
    "row_scores": TritonKernelSpec("row_scores", head_dim=128, rows=16, pool=8, num_stages=2),
    "row_scores_int8": TritonKernelSpec(
        "row_scores", head_dim=128, rows=16, pool=8, lines=128, int8=True, num_warps=8, num_stages=2
    ),
    "row_scores_masked": TritonKernelSpec(
        "row_scores",
        dtype="fp16",
        head_dim=80,
        rows=64,
        pool=64,
        window=True,
        padding=True,
        num_stages=2,
    ),
    "blocks_top_k": TritonKernelSpec("blocks", tile=SELECT_TILE, num_warps=1),
    "blocks_share": TritonKernelSpec("blocks", tile=SELECT_TILE, rule="share", num_warps=1),
    "blocks_mass": TritonKernelSpec("blocks", tile=SELECT_TILE, rule="mass", num_warps=1),
    "blocks_row_mass": TritonKernelSpec(
        "blocks", tile=SELECT_TILE, rule="row_mass", window=True, padding=True, num_warps=1
    ),
    "block_products": TritonKernelSpec("block_products", head_dim=128, num_stages=2),
    "block_products_masked": TritonKernelSpec(
        "block_products", dtype="fp16", head_dim=80, window=True, num_stages=2
    ),
    "x_attention": TritonKernelSpec(
        "x_attention", head_dim=128, tile=128, pool=8, num_warps=8, num_stages=3
    ),
    "x_attention_masked": TritonKernelSpec(
        "x_attention",
        dtype="fp16",
        head_dim=80,
        tile=128,
        pool=16,
        window=True,
        padding=True,
        num_warps=8,
        num_stages=3,
    ),
    "sampled_rows": TritonKernelSpec("sampled_rows", head_dim=128, num_stages=2),
    "sampled_rows_masked": TritonKernelSpec(
        "sampled_rows", dtype="fp16", head_dim=80, window=True, padding=True, num_stages=2
    ),
    "ints": TritonKernelSpec("ints", num_warps=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_source_is_the_golden_text(name):
    text = source.render(SPECS[name])
    ast.parse(text)
    assert "{{" not in text and "{%" not in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert_golden(text, GOLDEN / f"{name}.py.expected")


def test_every_template_has_a_golden_text():
    templates = {
        path.name.removesuffix(".py.jinja") for path in source.TEMPLATES.glob("*.py.jinja")
    }
    assert templates == {spec.template for spec in SPECS.values()}
    assert {path.name.split(".")[0] for path in GOLDEN.iterdir()} == set(SPECS)


def test_equal_text_is_one_file_and_other_text_another(tmp_path, monkeypatch):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    first = source.write_module("a = 1\n", "kernel")
    assert source.write_module("a = 1\n", "kernel") == first
    assert source.write_module("a = 2\n", "kernel") != first
    assert first.read_text() == "a = 1\n"
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".py", ".py"]


def test_interpreted_and_compiled_modules_live_in_one_process():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    spec = SPECS["pool"]
    assert isinstance(source.load(spec, interpret=True).pool_runs, InterpretedFunction)
    assert isinstance(source.load(spec).pool_runs, JITFunction)
    assert source.load(spec) is source.load(dataclasses.replace(spec))


def test_the_language_is_as_before_after_an_interpreted_launch():
    import triton.language as tl

    import mpass
    from tests.helpers.truth import random_attention

    spaces = (tl, tl.core, tl.math, tl.tensor)
    before = [dict(vars(space)) for space in spaces]
    query, key, value = random_attention(num_queries=130)
    index = mpass.AShape.estimate(
        EstimateInputs(query, key, AttentionMask(), range(4), 0.2), [mpass.AShape(8, 64)] * 4
    )
    attention.sparse_attention(AttentionInputs(query, key, value, AttentionMask(), 0.2), index)
    for space, content in zip(spaces, before, strict=True):
        changed = [name for name, value in content.items() if vars(space)[name] is not value]
        assert not changed, (space, changed)


def test_importing_the_lowering_does_not_import_triton():
    code = (
        "import sys, mpass, mpass.lowering.triton, mpass.lowering.triton.attention, "
        "mpass.lowering.triton.vertical_slash, mpass.lowering.triton.block_scores; "
        "sys.exit('triton' in sys.modules)"
    )
    run_python("-c", code)


def test_unsupported_tells_why_in_words():
    query = torch.empty(1, 2, 8, 32)
    assert "GPU" in unsupported(AttentionInputs(query, query, query, AttentionMask(), 1.0))


@pytest.mark.parametrize("target", TARGETS)
def test_parts_cover_every_head_size_once(target):
    for dim in range(16, 257):
        cut = parts(dim, target)
        assert all(width & (width - 1) == 0 and width >= 16 for _, width in cut)
        ends = [start + width for start, width in cut]
        assert [start for start, _ in cut] == [0, *ends[:-1]]
        assert ends[-1] >= dim and all(start < dim for start, _ in cut)


def test_table_has_a_tile_for_every_target_and_head_size():
    for target in TARGETS:
        for dim in range(16, 257):
            for few in range(len(FEATURES) + 1):
                tile = attention_tile(target, dim, dim, FEATURES[:few])
                assert tile.keys in (32, 64) and tile.num_warps in (4, 8)
                assert pack_warps(tile, tile.max_pack) <= 8


def test_chips_take_the_tiles_of_their_family():
    names = {"sm_80": "sm_80", "sm_86": "sm_80", "sm_89": "sm_80", "sm_90": "sm_90"}
    names |= {"sm_100": "sm_100", "sm_103": "sm_100", "sm_120": "sm_80", "gfx942": "gfx942"}
    assert {name: target_of(name) for name in names} == names


def test_heads_are_packed_only_where_all_packs_share_rows():
    assert query_heads_per_program((0, 0, 1, 1), 2, 2) == 2
    assert query_heads_per_program((0, 0, 1, 2), 2, 2) == 1
    assert query_heads_per_program((0, 0, 0), 3, 2) == 1
    assert query_heads_per_program((-1, -1, -1, -1), 4, 4) == 4
    assert query_heads_per_program((0, 0, 1, 1), 1, 2) == 1


def test_forms_of_slots():
    for slots, rows, entries in (
        ((0, 1, 2), "lists", "lists"),
        ((-1, -2), "diagonals", "diagonals"),
        ((0, -1), "mixed", "mixed"),
        ((1, 0), "mixed", "lists"),
        ((-1, -1), "mixed", "diagonals"),
    ):
        assert (row_form(slots), entry_form(slots)) == (rows, entries)
