"""Long prompts: no N x N tensor in the compiled graph, nor in memory."""

from __future__ import annotations

import json

import pytest

from tests.helpers.processes import run_python

SCRIPT = """
import json, resource, torch, transformers
from tests.helpers.toys import RecordingBackend
import mpass

LENGTH = 65536
config = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, vocab_size=64, max_position_embeddings=LENGTH,
)
model = transformers.AutoModel.from_config(config, attn_implementation=%(spelling)r).eval()
ids = torch.randint(0, 64, (1, LENGTH))
arguments = {"input_ids": ids, "use_cache": False}
if %(masked)r:
    arguments["attention_mask"] = torch.ones_like(ids)
backend = RecordingBackend(pattern=mpass.VerticalSlash(64, 128), inner_backend="aot_eager")
with torch.no_grad():
    model(ids[:, :300], use_cache=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = torch.compile(model, backend=backend, fullgraph=True)(**arguments)[0]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def biggest(graphs):
    sizes = (
        value.numel() for gm in graphs for node in gm.graph.nodes
        if isinstance(value := node.meta.get("example_value"), torch.Tensor)
    )
    return max(sizes)
print(json.dumps({
    "sparse": backend.count("minference.sparse_attention"),
    "captured": biggest(backend.before),
    "rewritten": biggest(backend.after),
    "megabytes": (after - before) / 1024,
    "finite": bool(out.isfinite().all()),
}))
"""


@pytest.mark.parametrize(("spelling", "masked"), [("sdpa", True), ("eager", False)])
def test_64k_tokens_need_no_square_tensor(spelling, masked):
    script = SCRIPT % {"spelling": spelling, "masked": masked}
    done = run_python("-c", script, OMP_NUM_THREADS="2")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["sparse"] == 1 and result["finite"]
    assert result["captured"] >= 65536**2, "the model builds no square tensor: nothing is shown"
    assert result["rewritten"] < 65536 * 128
    # One bool mask of 64K x 64K would be 4096 MiB.
    assert result["megabytes"] < 1024
