"""The predicted cost of attention on GPUs, and the promise that decisions by it keep.

No GPU is asked: a chip is a record. What an H200 took is in benchmarks/results.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from mpass.lowering.crossover import WORK_LENGTHS, LayerWork, PatternWork
from mpass.lowering.triton.chips import CHIPS, DENSE_CURVE, H100, H200, find_chip
from mpass.lowering.triton.cost_constants import (
    LENGTH,
    Rates,
    as_rates,
    measured_chip,
    plausible,
    save,
)
from mpass.lowering.triton.cost_model import breakeven_share, predict
from mpass.lowering.triton.decisions import (
    DENSER,
    LEAST_SPEEDUP,
    SHORTEST,
    calls_until_probe,
    known,
    least_lengths,
    lengths,
)
from mpass.lowering.triton.estimator_costs import COSTS
from mpass.patterns.base import find_pattern, registered_patterns
from mpass.patterns.base.work import layer_work
from tests.lowering.triton.test_prepare import MOST

PATTERNS = sorted(registered_patterns())
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def work(name: str = "union", heads: int = 32, kv_heads: int = 8, dim: int = 128) -> LayerWork:
    """A layer whose heads all have one pattern with its default parameters."""
    return layer_work(
        [find_pattern(name)()] * heads,
        dtype=torch.bfloat16,
        head_dim=dim,
        value_dim=dim,
        kv_heads=kv_heads,
    )


DENSE_MEASURED, MEASURED, SCORED = (
    json.loads((RESULTS / f"gpu_h200_{run}.json").read_text()) for run in (1, 3, 5)
)
"""Of the runs that dense attention's rates, our kernels' and the scoring of rows were fitted to."""

LAYERS = {
    "vertical slash": "vertical_slash",
    "block top k": "block_sparse",
    "block max": "block_max",
    "block top p": "block_top_p",
    "x_attention": "x_attention",
    "flex prefill": "flex_prefill",
    "sample attention": "sample_attention",
}
"""Names of the benchmark's rows, and the patterns that they ran with default parameters."""

CASES = [
    name
    for name in MEASURED["rows"]
    if name.startswith("layer/")
    and name.split("/")[1] in LAYERS
    and int(name.rsplit("/", 1)[1]) >= 8192
]


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_near_what_an_h200_took(name):
    """Device time of estimation and attention, replayed without the host; within 12%."""
    _, rule, length = name.split("/")
    row = MEASURED["rows"][name]
    layer = work(LAYERS[rule])
    found = predict(H200, layer, keys=int(length), density=row["work"])
    device = found.estimate + found.plan + found.attention
    assert device * 1e3 == pytest.approx(row["replayed_ms"], rel=0.12)


def test_the_estimation_of_union_is_near_what_an_h200_took():
    row = SCORED["rows"]["estimation/union bf16 of 64 rows/131072"]
    found = predict(H200, work(), keys=131072)
    assert found.estimate * 1e3 == pytest.approx(row["ms"], rel=0.12)
    for length in (32768, 131072):  # of which only the estimation is done otherwise now
        row = MEASURED["rows"][f"layer/union/{length}"]
        found = predict(H200, work(), keys=length, density=row["work"])
        assert found.attention * 1e3 == pytest.approx(row["kernels"]["sparse_attention"], rel=0.05)


def test_dense_attention_is_as_fast_as_on_an_h200():
    for name, row in DENSE_MEASURED["rows"].items():
        if name.startswith("attention/cudnn/"):
            found = predict(H200, work(), keys=int(name.rsplit("/", 1)[1]))
            assert found.dense * 1e3 == pytest.approx(row["ms"], rel=0.02)
    assert H200.measured.startswith(MEASURED["about"]["device"])
    assert MEASURED["about"]["triton"] in H200.measured
    assert all(chip.measured == "" for chip in CHIPS.values() if chip.name != "h200")


def test_the_parts_of_a_prediction_make_its_speedup():
    found = predict(H200, work(), keys=32768, density=0.12)
    parts = found.estimate + found.plan + found.attention
    assert found.sparse == max(parts, found.host + found.attention) > parts
    replayed = predict(H200, dataclasses.replace(work(), replayed=True), keys=32768, density=0.12)
    assert (replayed.sparse, replayed.speedup) == (parts, found.dense / parts)
    assert found.estimate == pytest.approx(sum(step.seconds for step in found.steps))


def test_what_the_host_launches_bounds_short_prompts():
    found = predict(H200, work(), keys=512, density=0.1)
    assert found.sparse == found.host + found.attention > found.estimate + found.plan


def test_the_bars_are_met_as_predicted():
    """Without what the host takes, as in a CUDA graph."""
    layer = dataclasses.replace(work(), replayed=True)
    assert predict(H200, layer, keys=8192, density=0.24).speedup >= 1.1
    assert predict(H200, layer, keys=131072, density=0.08).speedup >= 6.0
    shared = predict(H200, per_kv_head(layer), keys=131072, density=0.08)
    assert shared.speedup >= 8.0
    assert shared == predict(H200, layer, keys=131072, density=0.08, shared_index=True)
    assert predict(H200, work(), keys=8192, density=0.24).speedup < 1.0


def decided_seconds(chip, layer, keys: int, queries: int, density: float) -> tuple[float, float]:
    """Seconds of what the guards choose, and of dense attention."""
    least = least_lengths(chip, layer)
    found = predict(chip, layer, keys=keys, queries=queries, density=density)
    sparse = keys >= least.keys and queries >= least.queries and keys * queries >= least.area
    return (found.sparse if sparse else found.dense), found.dense


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_no_prompt_is_slower_than_dense_attention(chip, name):
    """The promise: at every length, as usual and where a prompt wants half as much again."""
    layer = work(name)
    exact = find_pattern(name).fixed_budget
    for length, denser in itertools.product(lengths(), (1.0,) if exact else (1.0, DENSER)):
        if length > 1 << 20:
            break
        density = min(1.0, denser * layer.patterns[0].density(length))
        chosen, dense = decided_seconds(chip, layer, length, length, density)
        assert chosen <= dense / LEAST_SPEEDUP, length
    assert lengths()[0] == SHORTEST == 128


@pytest.mark.parametrize("chip", [CHIPS["h100"], CHIPS["a100"]], ids=lambda chip: chip.name)
@pytest.mark.parametrize("sizes", [(32, 8, 128), (9, 3, 64), (8, 1, 256)])
def test_no_chunk_of_a_prompt_is_slower_than_dense_attention(chip, sizes):
    layer = work("union", *sizes)
    for keys, queries in itertools.product(lengths()[::4], lengths()[::4]):
        if queries <= keys <= 1 << 20:
            density = layer.patterns[0].density(keys)
            chosen, dense = decided_seconds(chip, layer, keys, queries, density)
            assert chosen <= dense / LEAST_SPEEDUP, (keys, queries)


def test_short_prompts_and_small_models_stay_dense_longer():
    least = least_lengths(H100, work())
    assert 8192 < least.keys <= 20480 and 128 <= least.queries <= least.keys
    assert least_lengths(H100, work("union", 9, 3, 64)).keys > least.keys
    assert least_lengths(CHIPS["b200"], work()).keys > least.keys


def test_chunks_of_a_long_prompt_are_sparse():
    least = least_lengths(H100, work())
    assert least.queries <= 2048 and least.area == least.keys**2
    assert predict(H100, work(), keys=131072, queries=2048).speedup > 1.5


def test_a_cuda_graph_makes_shorter_prompts_worth_it():
    replayed = dataclasses.replace(work(), replayed=True)
    assert least_lengths(H100, replayed).keys < least_lengths(H100, work()).keys
    assert predict(H100, replayed, keys=512).host == 0.0


def test_a_pattern_that_leaves_nothing_out_is_never_taken():
    assert least_lengths(H100, work("dense")).keys == lengths()[-1] == 1 << 24


def test_a_window_is_taken_where_prompts_are_longer_than_it():
    layer = dataclasses.replace(work("dense"), window=1024)
    least = least_lengths(H100, layer)
    assert 2048 < least.keys < 16384
    assert predict(H100, layer, keys=32768).density == pytest.approx(0.067, abs=0.01)


def test_the_breakeven_share_is_where_both_cost_the_same():
    share = breakeven_share(H100, work(), queries=32768, keys=32768, batch=1)
    assert 0.3 < share < 0.6
    assert predict(H100, work(), keys=32768, density=share).speedup == pytest.approx(1.0, rel=1e-3)
    assert breakeven_share(H100, work(), queries=512, keys=512, batch=1) == 0.0


def per_kv_head(layer: LayerWork) -> LayerWork:
    parts = tuple(dataclasses.replace(part, per_kv_head=True) for part in layer.patterns)
    return dataclasses.replace(layer, patterns=parts)


def test_a_layer_says_that_its_kv_heads_select_once():
    pattern = dataclasses.replace(find_pattern("union")(), per="kv_head")
    settings = {"dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "kv_heads": 8}
    layer = layer_work([pattern] * 32, **settings)
    expected = predict(H200, per_kv_head(work()), keys=131072)
    found = predict(H200, layer, keys=131072)
    assert (found.estimate, found.attention) == (expected.estimate, expected.attention)
    assert found.estimate < 0.35 * predict(H200, work(), keys=131072).estimate


def test_mixed_heads_cost_what_each_pattern_costs_and_a_join():
    names = ["union"] * 16 + ["a_shape"] * 16
    sizes = {"dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "kv_heads": 8}
    mixed = layer_work([find_pattern(name)() for name in names], **sizes)
    found = predict(H100, mixed, keys=32768)
    assert {"score_rows", "join"} <= {step.name for step in found.steps}
    halves = [predict(H100, work(name), keys=32768) for name in ("union", "a_shape")]
    assert found.density == pytest.approx(sum(half.density for half in halves) / 2)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_packaged_pattern_has_a_cost(name):
    layer = work(name)
    assert known(layer)
    costs = [predict(H100, layer, keys=length).sparse for length in WORK_LENGTHS]
    assert all(0 < before <= after for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_model_counts_the_launches_that_a_layer_makes(name):
    """As test_prepare.py has counted them; what launches counts for the host's time."""
    if name == "dense":
        return  # it is launched under a window only
    found = predict(H100, work(name), keys=4096)
    free = dataclasses.replace(H100, op=0.0)
    dear = dataclasses.replace(free, launch=free.launch + 1e6)
    hosts = [predict(chip, work(name), keys=4096).host for chip in (free, dear)]
    assert round(hosts[1] - hosts[0]) == MOST[name][0]
    assert found.host > hosts[0]


def test_an_estimator_of_another_package_has_no_known_cost():
    part = PatternWork(4, "comb(1)", "combs.index", None, (0.5,) * len(WORK_LENGTHS))
    assert not known(LayerWork(torch.bfloat16, 128, 128, 4, (part,)))
    assert "combs.index" not in COSTS


@pytest.mark.parametrize("name", PATTERNS)
def test_densities_never_rise_with_the_length(name):
    (part,) = work(name).patterns
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(part.densities))
    assert part.density(3000) <= part.density(2048) and part.density(3000) >= part.density(4096)
    assert part.exact == find_pattern(name).fixed_budget


@pytest.mark.parametrize(
    ("pattern", "length", "seen"),
    [
        ("union", 8192, 0.24),
        ("union", 32768, 0.122),
        ("union(mass=0.5, row_share=0.06)", 8192, 0.112),
        ("union(mass=0.85, row_share=0.007)", 8192, 0.387),
        ("vertical_slash(256, 256)", 8192, 0.257),
        ("vertical_slash(1024, 1024)", 32768, 0.357),
        ("block_max(share=0.3)", 8192, 0.242),
        ("x_attention(threshold=0.9)", 32768, 0.31),
        ("flex_prefill(gamma=0.7)", 8192, 0.24),
        ("sample_attention(coverage=0.9)", 32768, 0.28),
    ],
)
def test_expected_densities_are_near_those_that_were_measured(pattern, length, seen):
    """Densities of benchmarks/results/frontier.jsonl; too many are expected rather than too few."""
    from mpass.config.pattern_text import parse_pattern

    assert 0.9 * seen <= parse_pattern(pattern).usual_density(length) <= 1.75 * seen


@pytest.mark.parametrize(
    ("name", "architecture", "count", "found"),
    [
        ("NVIDIA H200", "sm_90", 132, "h200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", 132, "h100"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", 108, "a100"),
        ("NVIDIA B200", "sm_100", 148, "b200"),
        ("NVIDIA L40S", "sm_89", 142, "l40s"),
        ("NVIDIA GeForce RTX 4090", "sm_89", 128, "rtx4090"),
        ("AMD Instinct MI300X", "gfx942", 304, "mi300x"),
        ("NVIDIA Nothing", "sm_90", 132, "h100"),
        ("NVIDIA RTX PRO 6000", "sm_120", 188, "a100"),
    ],
)
def test_a_device_is_known_by_its_name_or_by_its_architecture(name, architecture, count, found):
    assert find_chip(name, architecture, count).name == found


def test_a_part_of_a_chip_has_a_part_of_its_rates():
    part = find_chip("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "sm_90", 66)
    assert (part.dense, part.cycles) == (H100.dense / 2, H100.cycles / 2)
    assert part.measured == ""


def test_looks_again_cost_a_hundredth_of_dense_attention():
    assert calls_until_probe(0.5) == 100
    assert calls_until_probe(0.9) == 12
    assert calls_until_probe(0.999) == 4
    assert calls_until_probe(0.0) == 512


def test_rates_come_from_timings_as_the_model_has_it():
    found = predict(H200, work("dense"), keys=LENGTH, density=1.0)
    rates = as_rates(found.dense, found.attention, 4.0 * H200.launch * 1e-6)
    assert rates.dense == pytest.approx(H200.dense, rel=0.01)
    assert rates.sparse == pytest.approx(H200.sparse, rel=0.01)
    assert rates.launch == pytest.approx(H200.launch, rel=0.1)


def test_the_curve_of_dense_attention_goes_through_its_points():
    for length, rate in DENSE_CURVE:
        assert H200.dense_rate(length) == pytest.approx(rate)
    slower = CHIPS["a100"]
    shares = [chip.dense_rate(2048) / chip.dense for chip in (slower, H200, CHIPS["b200"])]
    assert shares == sorted(shares, reverse=True)
    assert H200.dense_rate(1024) == H200.dense_rate(2048) / 2


def test_kept_rates_serve_and_others_are_left_alone(tmp_path, monkeypatch):
    from mpass.lowering.triton import cost_constants

    monkeypatch.setattr(cost_constants, "cache_dir", lambda: tmp_path)
    monkeypatch.delenv("MPASS_REMEASURE", raising=False)
    device = torch.device("cpu")
    assert measured_chip(H100, device) is H100
    machine = cost_constants.describe_machine(device)
    path = cost_constants.rates_path(machine)
    save(path, machine, Rates(500.0, 300.0, 60.0))
    found = measured_chip(H100, device)
    assert (found.dense, found.sparse, found.launch, found.op) == (
        500.0,
        300.0,
        60.0,
        10.0,
    ) and "this machine" in found.measured
    for broken in ("{}", "", path.read_text().replace("500.0", "5e9"), '{"version": 0}'):
        path.write_text(broken)
        assert measured_chip(H100, device) is H100
    assert not plausible(Rates(500.0, 300.0, -1.0), H100)


def test_nothing_is_timed_where_there_is_no_gpu(tmp_path, monkeypatch, caplog):
    from mpass.lowering.triton import cost_constants

    monkeypatch.setattr(cost_constants, "cache_dir", lambda: tmp_path)
    monkeypatch.setenv("MPASS_REMEASURE", "1")
    assert measured_chip(H100, torch.device("cpu")) is H100
    assert "were not measured" in caplog.text
    assert list(tmp_path.iterdir()) == []
