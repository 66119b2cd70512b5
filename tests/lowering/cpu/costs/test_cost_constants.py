"""Constants of the cost model: timed once, checked, kept whole, replaced when old or impossible."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpass.lowering.cpu import cost_constants as constants
from mpass.lowering.cpu.cost_model import CostConstants, EstimatorConstants
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import attention_spec, int8_reason
from tests.helpers.cpu_cases import needs_kernels

SPEC = KernelSpec("float32", 64, 64, "avx2")
PLAUSIBLE = constants.default_constants(SPEC)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, in memory and on disk."""
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    monkeypatch.delenv(constants.REMEASURE, raising=False)
    constants.machine_constants.cache_clear()
    yield tmp_path
    constants.machine_constants.cache_clear()


def only_file(cache: Path) -> Path:
    (path,) = (cache / "cpu-cost").iterdir()
    return path


def count_measurements(
    monkeypatch: pytest.MonkeyPatch, result: CostConstants = PLAUSIBLE
) -> list[KernelSpec]:
    calls: list[KernelSpec] = []

    def measure(spec: KernelSpec, dtype: torch.dtype) -> CostConstants:
        calls.append(spec)
        return result

    monkeypatch.setattr(constants, "measure_constants", measure)
    return calls


def machine_constants() -> CostConstants:
    """As a new process would find them."""
    constants.machine_constants.cache_clear()
    return constants.machine_constants(torch.float32, 64, 64)


@needs_kernels
def test_constants_are_timed_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine_constants()
    assert constants.implausible(first, SPEC) == ""
    monkeypatch.setattr(constants, "measure_constants", lambda *_: pytest.fail("timed again"))
    assert machine_constants() == first


@needs_kernels
def test_scores_in_8_bits_have_constants_of_their_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_measurements(monkeypatch)
    machine_constants()
    constants.machine_constants(torch.float32, 64, 64, int8=True)
    in_int8 = not int8_reason(torch.float32)
    assert [spec.int8 for spec in calls] == [False, True][: 1 + in_int8]
    assert len(list((cache / "cpu-cost").iterdir())) == len(calls)


@needs_kernels
@pytest.mark.skipif(bool(int8_reason(torch.float32)), reason=int8_reason(torch.float32) or "it can")
def test_scores_in_8_bits_are_timed_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = constants.run_attention

    def watch(spec, inputs, index):
        asked.append((spec.int8, inputs.int8))
        return run(spec, inputs, index)

    monkeypatch.setattr(constants, "run_attention", watch)
    monkeypatch.setattr(constants, "MEASURED_LENGTH", 128)
    spec = attention_spec(torch.float32, 40, 40, int8=True)
    assert constants.measure_constants(spec, torch.float32).tile >= 0
    assert set(asked) == {(True, True)}


@needs_kernels
def test_measuring_uses_one_thread_and_gives_the_others_back(cache: Path) -> None:
    threads = torch.get_num_threads()
    with constants.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


def test_measuring_uses_one_thread_where_an_engine_forbids_to_set_them(monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    torch._C.set_num_threads(2)
    try:
        with constants.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch._C.set_num_threads(before)


def test_time_of_other_threads_does_not_count() -> None:
    (seconds,) = constants.least_seconds([lambda: time.sleep(0.02)], repeats=1)
    assert seconds < 0.01


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: "[]",
        lambda content: content.replace(f'"version": {constants.VERSION}', '"version": 1'),
        lambda content: content.replace(constants.cpu_model() or '"cpu": ""', "another"),
        lambda content: content.replace(str(PLAUSIBLE.tile), "0.0"),
        lambda content: content.replace(str(PLAUSIBLE.tile), '"fast"'),
        lambda content: content.replace(str(PLAUSIBLE.dense_cell), "NaN"),
        lambda content: content.replace('"row"', '"line"'),
        lambda content: json.dumps(dataclasses.asdict(PLAUSIBLE)),
    ],
    ids=["cut", "list", "old", "machine", "zero", "words", "nan", "field", "unversioned"],
)
def test_a_bad_file_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    calls = count_measurements(monkeypatch)
    machine_constants()
    good = only_file(cache).read_text()
    only_file(cache).write_text(damage(good))
    assert only_file(cache).read_text() != good
    assert machine_constants() == PLAUSIBLE
    assert len(calls) == 2
    assert only_file(cache).read_text() == good
    machine_constants()
    assert len(calls) == 2


def test_the_environment_asks_for_a_new_measurement(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_measurements(monkeypatch)
    machine_constants()
    monkeypatch.setenv(constants.REMEASURE, "1")
    machine_constants()
    assert len(calls) == 2
    monkeypatch.setenv(constants.REMEASURE, "0")
    machine_constants()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tile", 1e-9, "a tile takes"),
        ("tile", 1e-2, "a tile takes"),
        ("column", 0.0, "a tile of columns takes"),
        ("dense_cell", 1e-15, "dense attention takes"),
        ("dense_cell", 0.0, "dense attention takes"),
        ("sparse_call", 0.1, "a call takes"),
        ("pack", 1.0, "packing a block takes"),
        ("row", -1e-9, "no set of times"),
        ("row", float("nan"), "no set of times"),
    ],
)
def test_implausible_times_are_named_and_give_way_to_defaults(
    cache: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: float, words: str
) -> None:
    wrong = dataclasses.replace(PLAUSIBLE, **{field: value})
    assert words in constants.implausible(wrong, SPEC)
    calls = count_measurements(monkeypatch, wrong)
    found = machine_constants()
    assert constants.implausible(found, calls[0]) == ""
    assert len(calls) == constants.ATTEMPTS
    assert not (cache / "cpu-cost").exists()


@pytest.mark.parametrize("instruction_set", constants.DEFAULT_GIGAFLOPS)
def test_defaults_are_plausible(instruction_set: str) -> None:
    spec = KernelSpec("bfloat16", 128, 96, instruction_set)
    assert constants.implausible(constants.default_constants(spec), spec) == ""


def test_a_cache_that_cannot_be_written_only_costs_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_measurements(monkeypatch)
    (cache / "cpu-cost").write_text("a file where the folder should be")
    assert machine_constants() == PLAUSIBLE
    assert len(calls) == 1


def save_often(number: int, folder: str) -> None:
    machine = {"subject": "race"}
    values = {name: float(number) for name in dataclasses.asdict(PLAUSIBLE)}
    for _ in range(200):
        constants.save_constants(Path(folder) / "race.json", machine, values)


def test_two_processes_write_whole_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_often, args=(i, str(tmp_path))) for i in (1, 2)]
    for writer in writers:
        writer.start()
    path, seen = tmp_path / "race.json", 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            found = constants.load_constants(
                path, {"subject": "race"}, lambda numbers: CostConstants(**numbers)
            )
            assert found is not None
            assert len(set(dataclasses.astuple(found))) == 1
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen > 0
    assert [file.name for file in tmp_path.iterdir()] == ["race.json"]


@needs_kernels
def test_estimators_are_timed_once_and_kept(cache: Path) -> None:
    calls = []

    def estimate(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        calls.append(query.shape)
        return query.transpose(-1, -2) @ key

    arguments = ("matmul()", torch.float32, 16, 2, estimate)
    first = constants.estimator_constants(*arguments)
    assert isinstance(first, EstimatorConstants)
    assert 0 < first.seconds(4096, 2) < 10
    assert {shape[2] for shape in calls} == set(constants.ESTIMATOR_LENGTHS)
    timed = len(calls)
    assert constants.estimator_constants(*arguments) == first
    assert len(calls) == timed


@needs_kernels
def test_timing_leaves_the_users_random_numbers_alone(cache: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    constants.machine_constants(torch.float32, 64, 64)
    constants.estimator_constants("test", torch.float32, 64, 1, lambda query, key: query.sum())
    assert torch.equal(torch.get_rng_state(), before)
