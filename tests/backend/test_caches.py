"""Inductor's disk caches with rewritten graphs: warm in a second process, never stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch._aot_autograd.autograd_cache import check_cacheable

import mpass
from mpass import backend
from mpass.lowering.cpu import linear_half, linear_rates
from tests.helpers.processes import run_python
from tests.helpers.toys import Decoder

SCRIPT = """
import json, sys, torch, mpass
from torch._dynamo.utils import counters
from tests.helpers.toys import Decoder
torch.manual_seed(0)
model, x = Decoder(depth=1).eval(), torch.randn(1, 300, 32)
pattern = mpass.AShape(1, int(sys.argv[1]))
options = {"pattern": pattern, "min_seq_len": 128, "dense_above": 2.0}
with torch.no_grad():
    out = torch.compile(model, backend="minference", options=options)(x)
    torch._dynamo.reset()
    expected = torch.compile(
        model, backend="minference", options=options | {"inner_backend": "eager"}
    )(x)
hits = [counters[of][name] for of, name in (
    ("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit"))]
print(json.dumps({
    "hits": hits,
    "sparse": len(mpass.last_report().sparse_sites),
    "error": (out - expected).abs().max().item(),
}))
"""


def run(cache: Path, window: int) -> dict[str, Any]:
    done = run_python("-c", SCRIPT, str(window), TORCHINDUCTOR_CACHE_DIR=str(cache))
    return json.loads(done.stdout)


def test_second_process_finds_the_graph_and_another_config_does_not(tmp_path):
    first = run(tmp_path, 20)
    second = run(tmp_path, 20)
    other = run(tmp_path, 100)
    assert (first["hits"], second["hits"], other["hits"]) == ([0, 0], [1, 1], [0, 0])
    assert all(result["sparse"] == 1 for result in (first, second, other))
    assert all(result["error"] < 1e-5 for result in (first, second, other))


@torch.no_grad()
def test_a_graph_of_another_version_is_not_taken(monkeypatch):
    """What a cached graph knows of our ops, as the sizes of results, may not hold any more."""
    tags = []

    def keep_tag(gm, inputs, **_):
        tags.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep_tag)
    for digest in ("one", "another"):
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "code_digest", lambda digest=digest: digest)
        torch.compile(torch.sin, backend="minference")(torch.ones(3))
    assert "one" in tags[0] and "another" in tags[1]
    assert torch.compiler.config.cache_key_tag == ""


EVERY_HEAD: dict[str, dict[str, Any]] = {
    "default": {},
    "layers in fp32": {"linear": "fp32"},
    "layers in half precision": {"linear": "half"},
    "layers in 8 bits": {"linear": "int8"},
    "measured": {"measure": True},
    "summaries": {"summaries": 64},
    "denoising": {"denoising": True},
    "grid": {"grid": (10, 30)},
    "selecting keys": {"kv_select": mpass.SnapKV(budget=64, window=32)},
}


@pytest.mark.parametrize("options", EVERY_HEAD.values(), ids=EVERY_HEAD)
@torch.no_grad()
def test_what_was_rewritten_can_be_kept_on_disk(options, monkeypatch):
    """AOTAutograd takes a graph from its cache only if it knows a value of what methods are of."""
    monkeypatch.setattr(linear_rates, "fp32_linear_pays", lambda dtype: True)
    monkeypatch.setattr(linear_half, "half_linear_reason", lambda dtype: "")
    seen = []

    def keep_graph(gm, inputs, **_):
        check_cacheable(gm)
        seen.append({node.target for node in gm.graph.nodes})
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep_graph)
    torch._dynamo.reset()
    model, x = Program().bfloat16().eval(), torch.randn(1, 300, 32).bfloat16()
    torch.compile(model, backend="minference", options={"min_seq_len": 128, **options})(x)
    (targets,) = seen
    assert mpass.last_report().sparse_sites
    changed = {str(target).split(".")[1] for target in targets if "minference." in str(target)}
    assert len(changed) >= 2  # attention, and linear layers


class Program(torch.nn.Module):
    """An attention and layers that methods of tensors are called on at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(depth=1)
        self.first, self.last = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.first(x).view(1, -1, 2, 32).relu().flatten(2)
        return self.decoder(self.last(wide).view(1, -1, 32)).contiguous()
