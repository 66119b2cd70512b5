"""What earlier calls selected decides later ones, and is never waited for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

import mpass
from mpass.lowering import dispatch
from mpass.lowering.crossover import LayerWork, LeastLengths
from mpass.lowering.density import causal_work_share, work_share
from mpass.lowering.device import Lowering
from mpass.lowering.index import AttentionMask, IndexWidth
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference import attention as reference
from mpass.lowering.triton import decisions, policy
from mpass.lowering.triton.chips import H100, H200
from mpass.lowering.triton.cost_model import breakeven_share, predict
from mpass.lowering.triton.work_memory import CALLS_PER_READING, Limits, WorkMemory
from mpass.match import find_attention
from mpass.options import parse_options
from mpass.patterns.base.work import layer_work
from mpass.plan import plan_attention
from tests.helpers.triton_cases import SLOTS, random_index
from tests.helpers.truth import random_attention
from tests.lowering.triton.test_sync import COPIES_FROM_THE_HOST, READS_THE_DEVICE, OpNames

KEY = ("an attention",)


class Delayed:
    """A reading that is there when the test says so; it must not be asked for before."""

    def __init__(self, share):
        self.share, self.there = share, False

    def ready(self):
        return self.there

    def value(self):
        assert self.there, "the host would have waited"
        return float(self.share)


class Calls:
    """Calls of one attention whose share of the work is known to the test."""

    def __init__(self, most=0.5, interval=3):
        self.readings = []
        self.limits = Limits(most, math.inf, 1.0, lambda sparse: interval)
        self.memory = WorkMemory(self.start)

    def start(self, share):
        self.readings.append(Delayed(share))
        return self.readings[-1]

    def call(self, share, *, arrive=True):
        """One call; whether it ran dense. arrive: what was measured is there afterwards."""
        reason = self.memory.begin(KEY, "union", (), lambda parts, known: self.limits)
        again = self.memory.begin(KEY, "a_shape", (), lambda parts, known: self.limits)
        assert reason == again == self.memory.decided(KEY)
        self.memory.finish(KEY, lambda: torch.tensor(share))
        for reading in self.readings:
            reading.there = reading.there or arrive
        return bool(reason)


def test_a_call_runs_dense_once_it_is_known_that_sparse_is_slower():
    calls = Calls()
    assert [calls.call(0.8), calls.call(0.8)] == [False, True]
    reason = calls.memory.begin(KEY, "union", (), lambda *_: calls.limits)
    assert reason == "80% of the work was selected in an earlier call, sparse pays up to 50% here"


def test_calls_stay_sparse_as_long_as_it_pays():
    calls = Calls()
    assert not any(calls.call(0.4) for _ in range(20))
    assert len(calls.readings) == 20 / CALLS_PER_READING


def test_what_is_not_there_yet_is_not_waited_for():
    calls = Calls()
    assert not any(calls.call(0.8, arrive=False) for _ in range(9))
    assert len(calls.readings) == 1
    calls.readings[0].there = True
    assert calls.call(0.8)


def test_dense_calls_are_followed_by_a_look_whether_sparse_pays_again():
    calls = Calls(interval=3)
    calls.call(0.8)
    assert [calls.call(0.8) for _ in range(8)] == [True] * 3 + [False] + [True] * 3 + [False]
    assert [calls.call(0.3) for _ in range(4)] == [True] * 3 + [False]
    assert not any(calls.call(0.3) for _ in range(9))


def test_a_look_that_is_not_read_yet_is_not_taken_again():
    """A host that runs ahead of the device would otherwise launch one sparse call after another."""
    calls = Calls(interval=3)
    calls.call(0.8)
    assert [calls.call(0.8, arrive=False) for _ in range(8)] == [True] * 3 + [False] + [True] * 4
    assert len(calls.readings) == 2
    calls.readings[-1].there = True
    assert calls.call(0.8)


def test_a_decision_stands_for_all_ops_of_a_call():
    calls = Calls()
    calls.call(0.8, arrive=False)
    assert calls.memory.begin(KEY, "union", (), lambda *_: calls.limits) == ""
    calls.readings[0].there = True  # between the estimation and the attention of one call
    assert calls.memory.begin(KEY, "a_shape", (), lambda *_: calls.limits) == ""
    assert calls.memory.decided(KEY) == ""
    calls.memory.finish(KEY, lambda: torch.tensor(0.8))
    assert calls.call(0.8)


def test_an_end_without_a_beginning_changes_nothing():
    calls = Calls()
    calls.memory.finish(KEY, lambda: torch.tensor(0.8))
    assert calls.readings == [] and calls.memory.decided(KEY) == ""


def test_what_is_remembered_is_bounded(monkeypatch):
    from mpass.lowering.triton import work_memory

    monkeypatch.setattr(work_memory, "MOST_REMEMBERED", 3)
    memory = WorkMemory(Delayed)
    for number in range(10):
        memory.recall((number,))
    assert list(memory.known) == [(7,), (8,), (9,)]


WIDTHS = {
    "lists": IndexWidth(3, 0, 0),
    "diagonals": IndexWidth(0, 3, 70),
    "mixed": IndexWidth(3, 3, 70),
}


@pytest.mark.parametrize("form", WIDTHS)
@pytest.mark.parametrize("length", [64, 300, 700])
def test_the_share_is_counted_without_reading_the_device(form, length):
    sizes = {"batch": 2, "num_queries": length, "num_keys": length}
    index = random_index(SLOTS[form], AttentionMask(), **sizes, width=WIDTHS[form])
    with OpNames() as ops:
        share = causal_work_share(index, length)
    assert not ops.names & (READS_THE_DEVICE | COPIES_FROM_THE_HOST)
    assert float(share) == pytest.approx(work_share(index, AttentionMask(), length, length))


@pytest.fixture
def gpu_policy(monkeypatch):
    """The CPU's tensors under the policy of GPUs, computed in plain torch; an H100 decides."""
    limits = {"keys": 64, "most": 0.5, "dense": math.inf, "area": 0}

    def limits_of(chip, work, length, batch, share, dense_above):
        assert isinstance(work, LayerWork) and work.patterns
        return Limits(min(limits["most"], dense_above), limits["dense"], 1.0, lambda sparse: 3)

    monkeypatch.setattr(policy, "limits_of", limits_of)
    monkeypatch.setattr(dispatch, "_added", {})
    policy.memory_of.cache_clear()
    toy = Lowering(
        name="toy",
        device="cpu",
        serves=lambda inputs: None,
        sparse_attention=reference.sparse_attention,
        least_lengths=lambda work, device: LeastLengths(limits["keys"], 1, limits["area"]),
        begin_call=policy.begin_call,
        decided=policy.decided,
        end_call=policy.end_call,
    )
    dispatch.register_lowering(toy)
    torch._dynamo.reset()
    yield limits
    torch._dynamo.reset()
    policy.memory_of.cache_clear()


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def compiled(program=attend, **options):
    options = {"inner_backend": "eager", "pattern": mpass.AShape(16, 100), **options}
    return torch.compile(program, backend="minference", options=options)


def prompt(length):
    """Inputs whose length is no constant of the program."""
    inputs = random_attention(num_queries=length)
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 2)
    return inputs


def lowerings_of(run, inputs, times):
    """What ran each of some calls, and the result of the last."""
    with record() as log, torch.no_grad():
        for _ in range(times):
            out = run(*inputs)
    return [call.lowering for call in log.calls], out, log


def test_programs_run_dense_where_earlier_calls_selected_too_much(gpu_policy):
    inputs = random_attention(num_queries=200)
    ran, out, log = lowerings_of(compiled(), inputs, 6)
    assert ran == ["toy", "dense", "dense", "dense", "toy", "dense"]
    assert "was selected in an earlier call" in log.calls[1].reason
    assert (out - attend(*inputs)).abs().max() < 1e-5


def test_programs_stay_sparse_where_that_pays(gpu_policy):
    gpu_policy["most"] = 1.0
    ran, _, log = lowerings_of(compiled(dense_above=0.99), random_attention(num_queries=200), 4)
    assert ran == ["toy"] * 4 and not log.calls[-1].reason


def test_programs_run_dense_where_launching_takes_longer_than_dense_attention(gpu_policy):
    gpu_policy |= {"most": 1.0, "dense": 1e-9}
    run = compiled(dense_above=0.99)
    ran, _, log = lowerings_of(run, random_attention(num_queries=200), 6)
    # The first call may build kernels and says nothing about the others.
    assert ran == ["toy", "toy", "dense", "dense", "dense", "toy"]
    assert "launching it took" in log.calls[2].reason


def test_dense_above_bounds_the_share_and_one_switches_the_memory_off(gpu_policy):
    gpu_policy["most"] = 1.0
    inputs = random_attention(num_queries=200)
    assert lowerings_of(compiled(dense_above=0.1), inputs, 3)[0] == ["toy", "dense", "dense"]
    torch._dynamo.reset()
    gpu_policy["most"] = 0.0
    assert lowerings_of(compiled(dense_above=1.0, min_seq_len=64), inputs, 3)[0] == ["toy"] * 3


def test_the_layer_s_own_shortest_prompt_is_guarded(gpu_policy):
    gpu_policy["keys"] = 256
    run, short = compiled(), prompt(200)
    ran, out, _ = lowerings_of(run, short, 1)
    assert ran == [] and torch.equal(out, attend(*short))
    assert "(200 now) keys, sparse from 256 on" in mpass.reports()[-1].sites[0].reason
    assert lowerings_of(run, prompt(300), 1)[0] == ["toy"]
    assert "prompts of 256 tokens and more" in mpass.reports()[-1].summary()


def chunk(query, key, value):
    """The last queries of a prompt."""
    offset = key.shape[2] - query.shape[2]
    rows = torch.arange(query.shape[2])[:, None] + offset
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=torch.arange(key.shape[2]) <= rows, enable_gqa=True
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_need_enough_queries_for_their_keys(gpu_policy, dynamic):
    gpu_policy["area"] = 100 * 300
    run = compiled(chunk)
    for queries, keys, sparse in ((90, 300, False), (110, 300, True), (90, 400, True)):
        inputs = random_attention(num_queries=queries, num_keys=keys)
        for tensor in inputs if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 2)
        ran, out, _ = lowerings_of(run, inputs, 1)
        assert ran == (["toy"] if sparse else []), (queries, keys)
        reason = mpass.reports()[-1].sites[0].reason
        assert sparse or reason.endswith("queries, sparse from 100 on")
        assert (out - chunk(*inputs)).abs().max() < (5.0 if sparse else 1e-5)


def test_a_shortest_prompt_that_is_given_counts_alone(gpu_policy):
    gpu_policy["keys"] = 256
    run = compiled(min_seq_len=100)
    assert lowerings_of(run, random_attention(num_queries=200), 1)[0] == ["toy"]


def test_lengths_and_layers_are_remembered_apart(gpu_policy):
    def two(query, key, value):
        return attend(attend(query, key, value), key, value)

    run, inputs = compiled(two), prompt(200)
    assert lowerings_of(run, inputs, 2)[0] == ["toy", "toy", "dense", "dense"]
    assert lowerings_of(run, prompt(400), 1)[0] == ["toy", "toy"]
    assert lowerings_of(run, inputs, 1)[0] == ["dense", "dense"]
    assert len(policy.memory_of(torch.device("cpu")).known) == 4


def inputs_of(**changes):
    query, key, value = random_attention(num_queries=200)
    return dataclasses.replace(AttentionInputs(query, key, value, AttentionMask(), 0.2), **changes)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(causal=False),
        AttentionMask(window=50),
        AttentionMask(key_mask=torch.ones(1, 200, dtype=torch.bool)),
    ],
)
def test_only_whole_causal_prompts_are_remembered(mask):
    assert policy.key_of(inputs_of(mask=mask), 7) is None
    assert policy.key_of(inputs_of(), 7) is not None
    assert policy.key_of(inputs_of(), 0) is None


def test_nothing_is_remembered_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(policy, "capturing", lambda device: True)
    inputs = inputs_of()
    assert policy.key_of(inputs, 7) is None
    assert policy.begin_call(inputs, "union", (), 7, 0.6) == ""
    assert policy.decided(inputs, 7) == ""


def test_calls_may_run_in_inference_mode_and_without_it(gpu_policy):
    """What the first call allocates is written to by all others, whatever mode they run in."""
    run, inputs = compiled(), random_attention(num_queries=200)
    with torch.inference_mode(), record() as log:
        run(*inputs)
    with torch.device("meta"):
        ran, out, _ = lowerings_of(run, inputs, 5)
    assert [call.lowering for call in log.calls] == ["toy"]
    assert ran == ["dense", "dense", "dense", "toy", "dense"]
    assert (out - attend(*inputs)).abs().max() < 1e-5


def union_layer(**changes):
    sizes = {"dtype": torch.bfloat16, "head_dim": 128, "value_dim": 128, "kv_heads": 8}
    return dataclasses.replace(layer_work([mpass.Union()] * 32, **sizes), **changes)


def test_limits_are_what_the_cost_model_says_of_the_chip():
    layer = union_layer(replayed=True)
    found = policy.limits_of(H200, layer, 32768, 1, 0.9, 1.0)
    predicted = predict(H200, layer, keys=32768, density=0.9)
    sizes = {"queries": 32768, "keys": 32768, "batch": 1}
    assert found.most == breakeven_share(H200, layer, **sizes, speedup=decisions.SURE)
    assert (found.dense, found.sparse) == (predicted.dense, predicted.sparse)
    assert found.sparse > found.dense and found.most < 0.9
    assert found.interval(found.sparse) > found.interval(1.1 * found.dense) >= 4
    assert policy.limits_of(H200, union_layer(), 32768, 1, 0.9, 0.2).most == 0.2


def test_an_estimator_of_unknown_cost_is_bounded_by_dense_above_alone():
    foreign = dataclasses.replace(union_layer().patterns[0], estimator="comb")
    work = union_layer(patterns=(foreign,))
    found = policy.limits_of(H200, work, 32768, 1, 0.9, 0.6)
    assert (found.most, found.dense) == (0.6, math.inf)
    assert policy.least_lengths(work, torch.device("cpu")).keys == 2048


def test_a_machine_without_a_gpu_is_taken_for_an_h100():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, whose chip it is")
    least = policy.least_lengths(union_layer(), torch.device("cuda", 0))
    assert least == decisions.least_lengths(H100, union_layer())


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_what_the_host_takes_does_not_count_in_cuda_graphs(gpu_policy, mode):
    asked = []

    def least_lengths(work, device):
        asked.append(work)
        return LeastLengths(64, 1)

    own = dispatch.device_lowering("cpu")
    dispatch.register_lowering(dataclasses.replace(own, least_lengths=least_lengths))
    torch._dynamo.reset()
    chosen = parse_options(mode, {})
    captured = []

    def capture(gm, inputs):
        captured.extend(find_attention(gm))
        for site in captured:
            plan_attention(site, chosen)
        return gm.forward

    with torch.no_grad():
        torch.compile(attend, backend=capture)(*random_attention(num_queries=200))
    assert [work.replayed for work in asked] == [mode is not None]
    assert (asked[0].heads, asked[0].kv_heads, asked[0].head_dim) == (4, 2, 32)


def test_softcaps_and_sinks_are_never_made_dense(gpu_policy):
    def capped(query, key, value):
        scores = query @ key.mT * 0.2
        scores = 30.0 * torch.tanh(scores / 30.0)
        hidden = torch.ones(200, 200, dtype=torch.bool).triu(1)
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value

    inputs = random_attention(kv_heads=4, num_queries=200)
    assert lowerings_of(compiled(capped), inputs, 4)[0] == ["toy"] * 4
