"""What a GPU keeps dense, planned on tensors that only say that they lie on one."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.lowering.triton import LOWERING
from mpass.options import Options
from mpass.patterns.base import find_pattern, registered_patterns
from mpass.patterns.base.scored import ListPattern
from mpass.plan import AttentionPlan, Skip, plan_attention


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def planned(
    pattern: str, *, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> AttentionPlan | Skip:
    """The plan of a causal attention over 8192 tokens on a GPU."""
    graph = fx.Graph()
    with FakeTensorMode():
        tensor = torch.empty(1, 4, 8192, head_dim, dtype=dtype, device="cuda")
    nodes = [graph.placeholder(name) for name in ("query", "key", "value")]
    output = graph.call_function(torch.nn.functional.scaled_dot_product_attention, tuple(nodes))
    for node in (*nodes, output):
        node.meta["example_value"] = tensor
    site = AttentionSite(output, *nodes, 0.1, MaskMeaning(causal=True), "sdpa", layer=0)
    return plan_attention(site, Options(pattern=find_pattern(pattern)(), min_seq_len=0))


@pytest.mark.parametrize("name", ["vertical_slash", "x_attention", "flex_prefill", "tri_shape"])
def test_patterns_are_planned_on_a_gpu(name):
    plan = planned(name)
    assert isinstance(plan, AttentionPlan) and plan.patterns[0].name == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.float32}, "bfloat16 or float16, not float32"),
        ({"head_dim": 8}, "head_dim 8 is outside of 16 to 256"),
    ],
)
def test_what_the_kernels_do_not_take_stays_dense_and_says_why(arguments, words):
    plan = planned("union", **arguments)
    assert isinstance(plan, Skip) and words in plan.reason


def test_old_gpus_stay_dense(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    plan = planned("union")
    assert isinstance(plan, Skip) and "8.0 (Ampere)" in plan.reason


def test_every_estimator_in_lists_has_kernels():
    own = [
        cls
        for cls in registered_patterns().values()
        if issubclass(cls, ListPattern)
        and cls.estimator.reference.__module__.startswith("mpass.lowering.")
    ]
    assert len(own) >= 5
    for cls in own:
        assert cls.estimator in LOWERING.estimators, cls.name
