"""Inductor's disk caches with rewritten graphs: warm in a second process, never stale."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mpass import backend
from tests.helpers.processes import run_python

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
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "sparse": len(mpass.last_report().sparse_sites),
    "error": (out - expected).abs().max().item(),
}))
"""


def run(cache: Path, window: int) -> dict[str, float]:
    done = run_python("-c", SCRIPT, str(window), TORCHINDUCTOR_CACHE_DIR=str(cache))
    return json.loads(done.stdout)


def test_second_process_finds_the_graph_and_another_config_does_not(tmp_path):
    first = run(tmp_path, 20)
    second = run(tmp_path, 20)
    other = run(tmp_path, 100)
    assert (first["hits"], second["hits"], other["hits"]) == (0, 1, 0)
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
