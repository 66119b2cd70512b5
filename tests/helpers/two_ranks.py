"""What two processes of torchrun find out, as JSON for tests/serving/test_ranks.py.

    torchrun --nproc_per_node 2 tests/helpers/two_ranks.py FOLDER

One pair of processes answers all questions, because starting a pair takes seconds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import mpass
from mpass.errors import MpassError

HEADS, KV_HEADS, LAYERS, TOKENS = 8, 4, 2, 300

OPTIONS: dict[str, Any] = {"inner_backend": "eager", "min_seq_len": 128, "dense_above": 1.0}

GATHERED = {
    **{f"model.layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"},
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
}
"""A plan by which each rank computes all heads, though the projections are sharded."""


def shape(number: int) -> mpass.AShape:
    """A pattern of its own for a head of a layer."""
    return mpass.AShape(1 + number, 20 + 5 * number)


PER_HEAD = mpass.SparseConfig(
    layers={
        layer: [shape(layer * HEADS + head) for head in range(HEADS)] for layer in range(LAYERS)
    },
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
)


def save_model(folder: Path, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Path:
    """A tiny Llama with random weights, the same on each rank."""
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        hidden_size=32 * heads,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(sizes).save_pretrained(folder)
    return folder


def load(folder: Path, plan: Any = None) -> nn.Module:
    """The model of a folder, sharded by a plan."""
    more = {}
    if plan is not None:
        more["distributed_config"] = transformers.DistributedConfig(tp_plan=plan)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, **more)
    return model.eval()


def run(model: nn.Module, config: mpass.SparseConfig) -> Tensor:
    """Logits of a compiled prefill."""
    torch._dynamo.reset()
    ids = (torch.arange(TOKENS)[None] * 7919) % 64
    forward = type(model).forward.__get__(model)
    options = OPTIONS | {"config": config}
    model.forward = torch.compile(forward, backend="minference", options=options)  # type: ignore[method-assign]
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False).logits
    return logits


def planned() -> list[list[str]]:
    """The patterns of each layer's heads on this rank."""
    return [list(site.patterns) for site in mpass.last_report().sites]


def error_of(question: Callable[[], Any]) -> str:
    """The name and text of the error that a call ends with; "" if it does not."""
    try:
        question()
    except Exception as error:
        refusal = getattr(error, "inner_exception", None) or error
        ours = "ours" if isinstance(refusal, MpassError) else "theirs"
        return f"{ours}: {type(refusal).__name__}: {refusal}"
    return ""


class SliceByHand(nn.Module):
    """An attention that computes half of its model's heads, which no sharded weight tells."""

    layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(num_attention_heads=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Tensor parallelism of transformers: what is planned, what is computed, what is refused."""
    found: dict[str, Any] = {}
    whole = run(load(folder), PER_HEAD)
    found["one process"] = planned()
    for name, plan in (("sliced", "auto"), ("gathered", GATHERED)):
        model = load(folder, plan)
        found[name] = {
            "difference": (run(model, PER_HEAD) - whole).abs().max().item(),
            "planned": planned(),
        }
    model = load(folder, "auto")
    run(model, mpass.SparseConfig("a_shape(9, 90)", layers={0: {0: shape(0), 6: shape(6)}}))
    found["few heads"] = planned()
    wrong = {
        "twice the heads": mpass.SparseConfig("a_shape", num_heads=2 * HEADS),
        "as many as a slice": mpass.SparseConfig(layers={0: [shape(0)] * (HEADS // 2)}),
    }
    found["wrong"] = {
        name: error_of(lambda config=config: run(model, config)) for name, config in wrong.items()
    }
    by_hand, x = SliceByHand(), torch.randn(1, HEADS // 2, TOKENS, 32)
    for name, layers in (("named", {0: {0: shape(0)}}), ("uniform", {0: shape(0)})):
        options = OPTIONS | {"config": mpass.SparseConfig("a_shape", layers)}
        module = torch.compile(by_hand, backend="minference", options=options)
        found[f"slice by hand, {name}"] = error_of(lambda module=module: module(x))
    return found


def uneven_heads(folder: Path) -> str:
    """9 heads over two ranks."""
    return error_of(lambda: run(load(folder, "auto"), mpass.SparseConfig("a_shape")))


def context_parallel(rank: int, ranks: int) -> dict[str, Any]:
    """All keys on each rank, and two chunks of the queries: a cheap one and a dear one."""
    torch.manual_seed(1)
    heads, kv_heads, tokens, dim = 4, 2, 2048, 32
    query = torch.randn(1, heads, tokens, dim) + 2 * torch.randn(1, heads, 1, dim)
    key = torch.randn(1, kv_heads, tokens, dim) + torch.randn(1, kv_heads, 1, dim)
    value = torch.randn(1, kv_heads, tokens, dim)
    size = tokens // (2 * ranks)
    own = [rank, 2 * ranks - 1 - rank]

    def rows(tensor: Tensor) -> Tensor:
        """The rows of this rank's chunks: what it holds before anything is gathered."""
        return torch.cat([tensor[:, :, c * size : (c + 1) * size] for c in own], 2)

    def gather(local: Tensor) -> Tensor:
        """All rows, in order, from those of each rank."""
        parts = [torch.empty_like(local) for _ in range(ranks)]
        dist.all_gather(parts, local.contiguous())
        chunks = {}
        for other, part in enumerate(parts):
            first, second = part.split(size, 2)
            chunks |= {other: first, 2 * ranks - 1 - other: second}
        return torch.cat([chunks[c] for c in range(2 * ranks)], 2)

    dense = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    found: dict[str, Any] = {}
    for pattern in ("a_shape(64, 256)", "vertical_slash(128, 256)", "union(0.3, 0.1, columns=64)"):
        keys, values = gather(rows(key)), gather(rows(value))
        parts = [
            mpass.attend(
                *(part, keys, values), patterns=pattern, query_offset=c * size, dense_above=1.0
            )
            for c, part in zip(own, rows(query).split(size, 2), strict=True)
        ]
        many = gather(torch.cat(parts, 2))
        one = mpass.attend(query, key, value, patterns=pattern, dense_above=1.0)
        found[pattern] = {
            "equal": torch.equal(many, one),
            "error of one call": (one - dense).abs().mean().item(),
            "error of chunks": (many - dense).abs().mean().item(),
        }
    return found


def main(folder: str) -> None:
    """All questions, in the same order on both ranks."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    base = Path(folder)
    if rank == 0:
        save_model(base / "model")
        save_model(base / "nine", 9, 3)
    dist.barrier()
    found = {
        "tensor parallel": tensor_parallel(base / "model"),
        "uneven heads": uneven_heads(base / "nine"),
        "context parallel": context_parallel(rank, ranks),
    }
    (base / f"rank{rank}.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
