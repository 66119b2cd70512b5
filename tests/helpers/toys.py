"""Small models, options for them, and a backend that keeps the graphs it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import mpass
from mpass.backend import minference

OPTIONS: dict[str, Any] = {"inner_backend": "eager", "min_seq_len": 128}
"""Options of tests about graphs: no Inductor, sparse from 128 tokens on."""

EVERY_KEY = mpass.VerticalSlash(1, 1 << 20)
"""A pattern that selects every key: the result is that of dense attention."""


class Attention(nn.Module):
    """Causal self-attention with grouped kv heads."""

    def __init__(self, dim: int = 32, heads: int = 4, kv_heads: int = 2, dropout: float = 0.0):
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            enable_gqa=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """A stack of attentions in a list named `layers`."""

    def __init__(self, depth: int = 3, **settings: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**settings) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def tiny_llama(**sizes: Any) -> nn.Module:
    """A Llama of transformers with random weights. The test is skipped without transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | sizes)).eval()


class RecordingBackend:
    """The backend under test; keeps every graph before and after the rewrite."""

    def __init__(self, **options: Any) -> None:
        self.options = OPTIONS | options
        self.before: list[fx.GraphModule] = []
        self.after: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.before.append(fx.GraphModule(gm, fx.Graph()))
        self.before[-1].graph = clone_graph(gm.graph)
        compiled = minference(gm, inputs, options=self.options)
        self.after.append(gm)
        return compiled

    def count(self, target: str) -> int:
        """Calls in all rewritten graphs whose target's name contains `target`."""
        return sum(target in str(n.target) for gm in self.after for n in gm.graph.nodes)


def clone_graph(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    output = copied.graph_copy(graph, {})
    if output is not None:
        copied.output(output)
    return copied


def compile_toy(
    model: nn.Module | Callable[..., Any], options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Callable[..., Any]:
    """torch.compile by backend name with the test options."""
    merged = OPTIONS | dict(options or {})
    return torch.compile(model, backend="minference", fullgraph=True, options=merged, **kwargs)
