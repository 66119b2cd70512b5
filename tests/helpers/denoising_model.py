"""A tiny model whose attention sees both ways, and a start, for tests of denoising steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

OPTIONS = {
    "pattern": "a_shape(0, 64)",
    "denoising": True,
    "dense_above": 2.0,
    "min_seq_len": 64,
    "inner_backend": "eager",
}

TOKENS = 200


class Layer(torch.nn.Module):
    """One attention of two heads that sees both ways."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x):
        parts = self.project(x).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + seen.transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    """Two of these layers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def noise(batch=1, tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 32, generator=generator) * 2


def distance(out, true):
    return float((out - true).norm() / true.norm())
