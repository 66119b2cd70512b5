"""Dense attention is chosen before estimation is paid for, wherever that can be known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import mpass
from mpass.lowering.cpu import dense as cpu_dense
from mpass.lowering.cpu.cost_model import CostConstants, EstimatorConstants, predict
from mpass.lowering.crossover import EstimatedWork
from mpass.lowering.index import AttentionMask, IndexWidth, list_slots, whole_index
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.recorder import Log, record
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.dense import dense_attention
from mpass.patterns.base import Pattern, head_slots, index_op, registered_patterns
from mpass.patterns.base import crossover as choice
from tests.helpers.cpu_cases import needs_kernels
from tests.helpers.truth import random_attention

HEAD_DIM = 40
"""As in test_estimators: a kernel is compiled once for both."""

CONSTANTS = CostConstants(
    dense_call=1e-5,
    dense_cell=4e-9,
    sparse_call=3e-5,
    row=1e-6,
    tile=1.4e-5,
    column=1.4e-5,
    pack=9e-6,
)


@pytest.fixture(autouse=True)
def fresh_decisions() -> Iterator[None]:
    choice.decide.cache_clear()
    yield
    choice.decide.cache_clear()


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> dict[str, EstimatorConstants]:
    """A machine of known speed; the estimator's constants can be set by the test."""
    found = {"estimator": EstimatorConstants(1e-5, 1e-8, 0.0)}
    monkeypatch.setattr(cpu_dense, "machine_constants", lambda *_: CONSTANTS)
    monkeypatch.setattr(cpu_dense, "estimator_constants", lambda *_: found["estimator"])
    return found


def count_estimates(monkeypatch: pytest.MonkeyPatch, cls: type[Pattern]) -> list[int]:
    """The lengths for which a pattern's estimator runs from now on."""
    lengths: list[int] = []
    original = cls.estimate

    def estimate(inputs, patterns):
        lengths.append(inputs.num_keys)
        return original(inputs, patterns)

    monkeypatch.setattr(cls, "estimate", estimate)
    return lengths


def run_ops(
    pattern: Pattern, length: int, *, dense_above: float = 0.6, min_seq_len: int = 0, heads: int = 4
) -> tuple[torch.Tensor, torch.Tensor, Log]:
    """What both ops of a layer give, what dense attention gives, and what was recorded."""
    query, key, value = random_attention(heads=heads, num_queries=length, head_dim=HEAD_DIM)
    cls = type(pattern)
    fields = [[number] * heads for number in pattern.parameters().values()]
    scalars = (0, 0, True, 0.2)
    with record() as log:
        index = index_op(cls)(
            query, key, None, list(range(heads)), *scalars, dense_above, min_seq_len, *fields
        )
        found = torch.ops.minference.sparse_attention(
            query,
            key,
            value,
            *index,
            list(head_slots([pattern] * heads, range(heads), 2)),
            None,
            None,
            *scalars,
            0.0,
            dense_above,
            min_seq_len,
            0,
        )
    inputs = AttentionInputs(query, key, value, AttentionMask(), 0.2)
    return found, dense_attention(inputs), log


@pytest.mark.parametrize(
    "pattern",
    [mpass.AShape(200, 200), mpass.BlockSparse(7), mpass.VerticalSlash(10, 400)],
    ids=str,
)
def test_a_budget_that_says_dense_costs_no_estimation(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern
) -> None:
    lengths = count_estimates(monkeypatch, type(pattern))
    found, truth, log = run_ops(pattern, 448)
    assert lengths == []
    assert [call.lowering for call in log.calls] == ["dense"]
    assert "of the work or more, dense above 60%" in log.calls[0].reason
    assert pattern.name in log.calls[0].reason
    assert (found - truth).abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(registered_patterns()))
def test_estimation_runs_where_dense_is_never_wanted(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cls = registered_patterns()[name]
    lengths = count_estimates(monkeypatch, cls)
    _, _, log = run_ops(cls(), 192, dense_above=1.0)
    assert lengths == [192]
    assert log.calls[0].reason == ""
    assert log.calls[0].lowering != "dense"


def test_a_short_prompt_costs_no_estimation(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = count_estimates(monkeypatch, mpass.AShape)
    found, truth, log = run_ops(mpass.AShape(1, 8), 300, dense_above=1.0, min_seq_len=301)
    assert lengths == []
    assert log.calls[0].reason == "300 keys, sparse from 301 on"
    assert (found - truth).abs().max() < 1e-5


@needs_kernels
@pytest.mark.parametrize(("seconds", "estimated"), [(1e-9, True), (1e-3, False)])
def test_the_estimate_counts_in_the_choice(
    monkeypatch: pytest.MonkeyPatch,
    constants: dict[str, EstimatorConstants],
    seconds: float,
    estimated: bool,
) -> None:
    constants["estimator"] = EstimatorConstants(0.0, seconds, 0.0)
    lengths = count_estimates(monkeypatch, mpass.Union)
    found, truth, log = run_ops(mpass.Union(max_blocks=64), 1024)
    assert lengths == ([1024] if estimated else [])
    # Random inputs have no sparsity: dense either way, but only one of them paid for the index.
    assert log.calls[0].lowering == "dense"
    words = "is selected" if estimated else "over 1024 keys does not pay here"
    assert words in log.calls[0].reason
    assert (found - truth).abs().max() < 1e-5


def work(fewest: float, exact: bool, length: int = 4096) -> EstimatedWork:
    return EstimatedWork(
        torch.float32, 64, 64, 8, 2, length, fewest, exact, "pattern", lambda query, key: None
    )


def test_estimation_must_leave_something_to_gain(constants: dict[str, EstimatorConstants]) -> None:
    sizes = {"length": 4096, "heads": 8, "kv_heads": 2}
    whole = predict(CONSTANTS, density=1.0, **sizes)
    gain = min(whole.dense, whole.sparse) - predict(CONSTANTS, density=0.2, **sizes).sparse
    assert gain > 0
    for share, pays in ((0.9, True), (1.1, False)):
        constants["estimator"] = EstimatorConstants(gain * share, 0.0, 0.0)
        assert cpu_dense.estimation_worthwhile(work(0.2, exact=True)) is pays
    # What a data-dependent pattern will find is a guess: its price has to be small besides.
    for share, pays in ((0.9 / cpu_dense.GAIN_RATIO, True), (0.9, False)):
        constants["estimator"] = EstimatorConstants(gain * share, 0.0, 0.0)
        assert cpu_dense.estimation_worthwhile(work(0.2, exact=False)) is pays
    assert not cpu_dense.estimation_worthwhile(work(1.0, exact=True))


def test_nothing_is_estimated_in_plain_torch_unless_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "mpass.lowering.cpu.support.unsupported", lambda *_: "no C++ compiler was found"
    )
    lengths = count_estimates(monkeypatch, mpass.AShape)
    run_ops(mpass.AShape(1, 8), 512)
    assert lengths == []
    run_ops(mpass.AShape(1, 8), 512, dense_above=1.0)
    assert lengths == [512]


@pytest.mark.parametrize("cls", registered_patterns().values(), ids=lambda cls: cls.name)
def test_min_density_is_no_more_than_what_is_computed(cls: type[Pattern]) -> None:
    length = 1000
    query, key, _ = random_attention(num_queries=length)
    computed = mpass.density(query, key, pattern=cls(), scale=0.2)
    # Sizes are rounded up to blocks of 64.
    assert cls().min_density(length) <= float(computed.min()) + 0.1
    if cls.fixed_budget:
        assert cls().min_density(length) >= float(computed.max()) - 0.1


@pytest.mark.parametrize("cls", [mpass.BlockSparse, mpass.AShape])
def test_whole_index_selects_all_that_is_causal(cls: type[Pattern]) -> None:
    query = torch.zeros(2, 3, 300, 8)
    index = whole_index(query, 5, IndexWidth(max_blocks=6), head_slots([cls()] * 3, range(3), 1))
    cells = reference.computed_mask(index, AttentionMask(), batch=2, num_queries=300, num_keys=300)
    assert torch.equal(cells, torch.ones(300, 300).tril().bool().expand(2, 3, -1, -1))


def test_whole_index_selects_every_block_however_short_its_lists_are() -> None:
    index = whole_index(torch.zeros(1, 1, 256, 8), 4, IndexWidth(max_blocks=2), list_slots(1))
    cells = reference.computed_mask(index, AttentionMask(), batch=1, num_queries=256, num_keys=256)
    assert torch.equal(cells[0, 0], torch.ones(256, 256).tril().bool())


@needs_kernels
@pytest.mark.parametrize("pattern", [mpass.Union(), mpass.VerticalSlash(40, 200)], ids=str)
def test_another_default_device_changes_nothing(pattern):
    query, key, value = random_attention(num_queries=300, head_dim=HEAD_DIM)
    inputs = AttentionInputs(query, key, value, AttentionMask(window=100), 0.25)
    cpu_dense.all_tiles.cache_clear()
    with torch.device("meta"):
        dense = cpu_dense.dense_attention(inputs)
        sparse = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    cpu_dense.all_tiles.cache_clear()
    assert torch.equal(dense, cpu_dense.dense_attention(inputs))
    again = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    assert torch.equal(sparse, again)


def test_what_pays_with_8_bit_scores_is_asked_of_their_own_constants(monkeypatch) -> None:
    slow = dataclasses.replace(CONSTANTS, tile=3e-5)
    fast = dataclasses.replace(CONSTANTS, tile=1e-5)
    monkeypatch.setattr(cpu_dense, "machine_constants", lambda *of: fast if of[-1] else slow)
    cpu_dense.breakeven_density_of.cache_clear()
    cpu_dense.kernel_is_faster.cache_clear()
    query, key, value = random_attention(heads=4, num_queries=4096, head_dim=HEAD_DIM)
    exact = AttentionInputs(query, key, value, AttentionMask(), 0.2)
    in_int8 = dataclasses.replace(exact, int8=True)
    try:
        assert cpu_dense.breakeven_density(exact) < 0.7 < cpu_dense.breakeven_density(in_int8)
        assert not cpu_dense.kernel_is_faster(*cpu_dense.sizes(exact))
        assert cpu_dense.kernel_is_faster(*cpu_dense.sizes(in_int8))
    finally:
        cpu_dense.breakeven_density_of.cache_clear()
        cpu_dense.kernel_is_faster.cache_clear()
