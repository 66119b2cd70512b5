"""Generated kernels compiled to machine code without a GPU: spills, shared memory, matrix units.

The default run compiles a few; `pytest -m slow tests/lowering/triton/compiled/test_compile.py` the
whole matrix.
"""

from __future__ import annotations

import dataclasses

import pytest

from mpass.lowering.index import BLOCK
from mpass.lowering.triton.assembly import PRODUCTS
from mpass.lowering.triton.compile import (
    Report,
    attention_report,
    compile_kernel,
    compiled_loops,
    table_spec,
)
from mpass.lowering.triton.spec import (
    GROUP_TILE,
    SCORE_STAGES,
    SELECT_TILE,
    SHARED_MEMORY,
    TritonKernelSpec,
    gradient_tile,
    parts,
    row_score_warps,
    score_programs,
    score_warps,
)

MAX_SPILL = 16
"""Bytes of spilled registers that a kernel of the table may have."""

MATRIX_UNIT = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}

HEAD_DIMS = [64, 80, 96, 128, 192, 256]

FLAGS = {
    "lists": {},
    "lists_columns": {"columns": True},
    "diagonals_columns": {"form": "diagonals", "columns": True},
    "mixed_columns": {"form": "mixed", "columns": True},
    "window": {"form": "mixed", "columns": True, "window": True},
    "padding": {"form": "mixed", "columns": True, "padding": True},
    "capped": {"form": "mixed", "columns": True, "softcap": True},
    "everything": {
        "form": "mixed",
        "columns": True,
        "window": True,
        "padding": True,
        "softcap": True,
        "sinks": True,
    },
    "biased": {"form": "mixed", "columns": True, "padding": True, "biased": True},
    "log_sum_exps": {"form": "mixed", "columns": True, "window": True, "lse": True},
}


def block_spec(rule: str, **flags) -> TritonKernelSpec:
    """The listing kernel, the same for rows of any length."""
    return TritonKernelSpec("blocks", tile=SELECT_TILE, rule=rule, num_warps=1, **flags)


def score_spec(template: str, head_dim: int, **values) -> TritonKernelSpec:
    """A kernel of estimation that multiplies query rows with means, or groups with groups."""
    lines = values.get("lines", BLOCK)
    shape = {"num_warps": score_warps(head_dim) * lines // BLOCK, "num_stages": 2}
    if template == "row_scores":
        shape["num_stages"] = SCORE_STAGES
        shape["num_warps"] = row_score_warps(head_dim, "biased" in values) * lines // BLOCK
    if template == "x_attention":
        shape = {"num_warps": 8, "num_stages": 3, "tile": GROUP_TILE}
    return TritonKernelSpec(template, head_dim=head_dim, **shape, **values)


SMALL_KERNELS = [
    (TritonKernelSpec("ints", num_warps=1), "write_ints"),
    (TritonKernelSpec("rows", num_warps=1), "plan_rows"),
    (
        TritonKernelSpec(
            "rows", form="mixed", columns=True, window=True, padding=True, num_warps=1
        ),
        "plan_rows",
    ),
    (TritonKernelSpec("turned", num_warps=1), "mark_readers"),
    (TritonKernelSpec("turned", num_warps=1), "list_readers"),
    (TritonKernelSpec("turned", form="mixed", window=True, num_warps=1), "plan_keys"),
    (TritonKernelSpec("columns", head_dim=192, value_dim=128), "gather_columns"),
    (TritonKernelSpec("last_queries", head_dim=128, num_stages=2), "row_statistics"),
    (
        TritonKernelSpec("last_queries", head_dim=128, window=True, padding=True, num_stages=2),
        "sum_probabilities",
    ),
    (
        TritonKernelSpec("last_queries", head_dim=256, num_warps=8, num_stages=2),
        "sum_probabilities",
    ),
    (TritonKernelSpec("select", tile=1024, window=True), "mark_distances"),
    (TritonKernelSpec("select", tile=1024), "list_columns"),
    (TritonKernelSpec("select", tile=1024), "list_diagonals"),
    (TritonKernelSpec("pool", head_dim=128, pool=64, padding=True), "pool_runs"),
    (
        TritonKernelSpec(*("listed", "bf16", 128, 96, 32), window=True, padding=True, softcap=True),
        "attend_as_listed",
    ),
    (TritonKernelSpec("pool", head_dim=256, pool=8, padding=True), "pool_runs"),
    (block_spec("top_k", window=True), "list_blocks"),
    (block_spec("share", target="sm_80"), "list_blocks"),
    (block_spec("row_mass", window=True, padding=True), "list_blocks"),
    (score_spec("block_products", 128, window=True), "multiply_means"),
    (score_spec("tile_scores", 128), "score_tiles"),
    (score_spec("row_scores", 128, rows=16, pool=8, target="sm_80"), "score_rows"),
    (score_spec("row_scores", 128, rows=16, pool=8, int8=True), "score_rows"),
    (score_spec("row_scores", 128, rows=16, pool=8, biased=True), "score_rows"),
    (TritonKernelSpec("last_queries", head_dim=64, biased=True, num_stages=2), "row_statistics"),
    (TritonKernelSpec("pool", head_dim=128, pool=8, int8=True), "pool_runs"),
    (TritonKernelSpec("pool", head_dim=256, int8=True, pool=64, padding=True), "find_centre"),
    (score_spec("sampled_rows", 128), "row_totals"),
    (score_spec("sampled_rows", 128, window=True, padding=True), "sum_columns"),
    (score_spec("x_attention", 128, pool=8), "score_groups"),
    (score_spec("x_attention", 128, pool=8, window=True), "sum_groups"),
]


def check_attention(spec: TritonKernelSpec) -> Report:
    report = attention_report(spec)
    assert report.spill_bytes <= MAX_SPILL
    assert report.shared_bytes <= SHARED_MEMORY[spec.target]
    # Two products per loop body, each over the parts of its dimension, at least.
    bodies = 3 if spec.columns else 2
    products = len(parts(spec.head_dim, spec.target)) + len(parts(spec.value_dim, spec.target))
    assert report.matrix_ops[MATRIX_UNIT[spec.target]] >= bodies * products
    others = {op: n for op, n in report.matrix_ops.items() if op != MATRIX_UNIT[spec.target]}
    assert not any(others.values())
    assert not report.serialized
    return report


@pytest.mark.parametrize(
    ("target", "head_dim", "flags"),
    [
        ("sm_90", 128, "lists"),
        ("sm_90", 128, "diagonals_columns"),
        ("sm_90", 96, "everything"),
        ("sm_90", 128, "biased"),
        ("sm_80", 128, "mixed_columns"),
        ("sm_80", 64, "everything"),
    ],
)
def test_attention_of_the_table_does_not_spill(target, head_dim, flags):
    check_attention(table_spec(target, head_dim, **FLAGS[flags]))


def test_heads_of_a_static_pattern_together_do_not_spill():
    report = check_attention(table_spec("sm_90", 128, form="diagonals", columns=True, pack=2))
    assert report.num_warps == 8


GRADIENTS = ("query_gradients", "column_gradients", "key_gradients")
"""Kernels of the backward pass, named as their templates."""

MAX_OUTER_SPILL = 160
"""Bytes that they may spill where no product is: a loop's own numbers, kept while others run."""


def check_gradients(target: str, head_dim: int, kernel: str, **flags) -> None:
    tile = gradient_tile(target, kernel, head_dim, head_dim)
    sizes = {"head_dim": head_dim, "value_dim": head_dim, "tile": tile.keys, "target": target}
    shape = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    spec = TritonKernelSpec(kernel, **sizes, **shape, **flags)
    report = compile_kernel(spec, kernel)
    assert report.spill_bytes <= MAX_OUTER_SPILL
    assert report.shared_bytes <= SHARED_MEMORY[target]
    assert not report.serialized
    assert report.matrix_ops[MATRIX_UNIT[target]] > 0
    loops = compiled_loops(spec, kernel)
    # Full blocks and cut ones, and columns for queries; columns have a kernel of their own.
    expected = {"query_gradients": 2 + spec.columns, "key_gradients": 2, "column_gradients": 1}
    assert len(loops) == expected[kernel]
    assert all(loop.copies for loop in loops)
    assert not any(loop.spills for loop in loops)


def test_gradients_spill_nothing_in_a_loop():
    check_gradients("sm_90", 128, "key_gradients", columns=True)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["lists", "mixed_columns"])
@pytest.mark.parametrize("kernel", GRADIENTS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matrix_of_gradients_spills_nothing_in_a_loop(target, head_dim, kernel, flags):
    if kernel == "column_gradients" and not FLAGS[flags].get("columns"):
        pytest.skip("without columns there are no gradients of any")
    check_gradients(target, head_dim, kernel, **FLAGS[flags])


@pytest.mark.parametrize(("spec", "kernel"), SMALL_KERNELS, ids=lambda x: getattr(x, "template", x))
def test_small_kernels_do_not_spill(spec, kernel):
    report = compile_kernel(spec, kernel)
    assert report.spill_bytes <= MAX_SPILL
    assert report.shared_bytes <= SHARED_MEMORY[spec.target]


@pytest.mark.parametrize(
    ("target", "values"),
    [
        ("sm_90", {}),
        ("sm_90", {"head_dim": 256, "window": True, "padding": True}),
        ("sm_90", {"int8": True, "padding": True}),
        ("sm_90", {"rows": 64, "pool": 64}),
        ("sm_80", {"window": True}),
    ],
)
def test_a_multiprocessor_holds_the_programs_that_share_the_scoring_of_rows(target, values):
    values = {"head_dim": 128, "rows": 16, "pool": 8} | values
    spec = score_spec("row_scores", target=target, **values)
    report = compile_kernel(spec, "score_rows")
    assert report.spill_bytes <= MAX_SPILL
    assert report.programs(SHARED_MEMORY[target]) >= score_programs(spec)


@pytest.mark.parametrize(("target", "name"), [("sm_90", "IGMMA"), ("sm_80", "IMMA")])
def test_products_of_8_bit_numbers_are_the_chips_own(target, name):
    spec = score_spec("row_scores", 128, rows=16, pool=8, int8=True, target=target)
    loops = compiled_loops(spec, "score_rows")
    assert loops
    for loop in loops:
        assert {i.name.split(".")[0] for i in loop.body if i.of(*PRODUCTS)} == {name}
    if target == "sm_90":  # not one by one: all of a tile are under way together
        assert all(loop.chains == (4,) for loop in loops)
        assert not compile_kernel(spec, "score_rows").serialized


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "programs"),
    [
        (128, 0, 4),
        # Registers are handed out by eights: 169 are 176, of which three programs are too many.
        (168, 0, 3),
        (169, 0, 2),
        # A kilobyte of each program is the system's.
        (128, 115712, 2),
        (128, 115720, 1),
        (255, 232448, 1),
    ],
)
def test_report_tells_how_many_programs_fit_a_multiprocessor(registers, shared_bytes, programs):
    report = Report("attend", "sm_90", 4, registers, 0, shared_bytes, {})
    assert report.programs(SHARED_MEMORY["sm_90"]) == programs


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matrix_of_attention_kernels_does_not_spill(target, head_dim, dtype, flags):
    check_attention(table_spec(target, head_dim, dtype=dtype, **FLAGS[flags]))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matrix_of_packed_kernels_does_not_spill(target, head_dim):
    from mpass.lowering.triton.spec import attention_tile

    if attention_tile(target, head_dim, head_dim).max_pack < 2:
        pytest.skip("the table packs no heads at this size")
    check_attention(table_spec(target, head_dim, pack=2, form="mixed"))
    for flags in (
        {"window": True, "softcap": True},
        {"columns": True},
        {"columns": True, "window": True},
        {"columns": True, "window": True, "padding": True, "softcap": True, "sinks": True},
    ):
        check_attention(table_spec(target, head_dim, pack=2, form="mixed", **flags))
        check_attention(table_spec(target, head_dim, pack=2, form="diagonals", **flags))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("flags", ["lists", "diagonals_columns", "everything"])
def test_other_targets_compile(target, head_dim, flags):
    spec = table_spec(target, head_dim, **FLAGS[flags])
    report = attention_report(spec)
    assert report.shared_bytes <= SHARED_MEMORY[target]
    assert report.matrix_ops[MATRIX_UNIT[target]] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.parametrize(("spec", "kernel"), SMALL_KERNELS, ids=lambda x: getattr(x, "template", x))
def test_small_kernels_compile_for_every_target(target, spec, kernel):
    report = compile_kernel(dataclasses.replace(spec, target=target), kernel)
    assert report.shared_bytes <= SHARED_MEMORY[target]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["top_k", "share", "mass", "row_mass"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_lists_of_every_rule_do_not_spill(target, rule):
    flags = {} if rule == "top_k" else {"window": True, "padding": True}
    for spec in (block_spec(rule), block_spec(rule, causal=False), block_spec(rule, **flags)):
        report = compile_kernel(dataclasses.replace(spec, target=target), "list_blocks")
        assert report.spill_bytes <= MAX_SPILL


SCORES = {
    "score_tiles": ("tile_scores", {}),
    "score_rows": ("row_scores", {"rows": 16, "pool": 8}),
    "score_rows in 8 bits": ("row_scores", {"rows": 16, "pool": 8, "int8": True}),
    "score_rows of 128 rows": ("row_scores", {"rows": 16, "pool": 8, "lines": 128}),
    "score_rows of whole blocks": ("row_scores", {"rows": 64, "pool": 64}),
    "score_rows of single keys": ("row_scores", {"rows": 8, "pool": 1}),
    "multiply_means": ("block_products", {}),
    "row_totals": ("sampled_rows", {}),
    "sum_columns": ("sampled_rows", {}),
    "score_groups": ("x_attention", {"pool": 8}),
    "score_groups of 16": ("x_attention", {"pool": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_matrix_of_block_scores_does_not_spill(target, head_dim, name, dtype):
    template, values = SCORES[name]
    for flags in ({}, {"window": True, "padding": True}):
        spec = score_spec(template, head_dim, target=target, dtype=dtype, **values, **flags)
        report = compile_kernel(spec, name.split()[0])
        assert report.spill_bytes <= MAX_SPILL
        assert report.shared_bytes <= SHARED_MEMORY[target]
        assert report.matrix_ops[MATRIX_UNIT[target]] > 0
