"""A small diffusion transformer over procedural pictures, and how it is sampled.

No weights of a diffusion transformer can be had where this was written, so that one is trained
(train.py). It is a DiT (arXiv 2212.09748): patches of 2 x 2 pixels, adaptive layer norms, classes,
and no mask in its attention. It learns the velocity of rectified flow (arXiv 2209.03003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2
KINDS = 4
"""Classes of pictures: discs, squares, stripes, and a grid of dots. Class KINDS is none of them."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model: width, layers and heads."""

    width: int = 128
    layers: int = 4
    heads: int = 2


def coordinates(side: int) -> Tensor:
    """Row and column of each of side * side places, from 0 to 1: [side * side, 2]."""
    line = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


def waves(x: Tensor, count: int, highest: float) -> Tensor:
    """Sines and cosines of x at `count` frequencies up to `highest` turns: [..., 2 * count]."""
    turns = torch.logspace(0, math.log2(highest), count, base=2.0)
    angle = 2 * math.pi * x[..., None] * turns
    return torch.cat([angle.sin(), angle.cos()], -1)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions: x [B, H, N, D], angle [N, D / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Layer(nn.Module):
    """Attention and a feed-forward part, each scaled, shifted and gated by the condition."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_query = nn.LayerNorm(width // sizes.heads)
        self.norm_key = nn.LayerNorm(width // sizes.heads)
        self.out = nn.Linear(width, width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.condition = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor, angle: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(condition)[:, None].chunk(6, -1)
        inner = self.norm1(x) * (1 + scale) + shift
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(inner).chunk(3, -1)
        )
        query = rotate(self.norm_query(query), angle)
        key = rotate(self.norm_key(key), angle)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + gate * self.out(seen.transpose(1, 2).flatten(2))
        inner = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.narrow(F.gelu(self.wide(inner), approximate="tanh"))


class DiT(nn.Module):
    """Velocity [B, 3, S, S] of pictures [B, 3, S, S] at times [B], 0 for noise, and of classes."""

    def __init__(self, sizes: Sizes = Sizes()) -> None:
        super().__init__()
        width = sizes.width
        self.head_dim = width // sizes.heads
        self.patch = nn.Linear(3 * PATCH * PATCH, width)
        self.place = nn.Linear(2 * 32, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(KINDS + 1, width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * PATCH * PATCH)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor, kind: Tensor) -> Tensor:
        side = x.shape[-1] // PATCH
        places = coordinates(side)
        turns = torch.logspace(0, 5, self.head_dim // 4, base=2.0)
        angle = (2 * math.pi * places[..., None] * turns).flatten(1)
        condition = F.silu(self.time(waves(time, 32, 64.0)) + self.kind(kind))
        tokens = F.pixel_unshuffle(x, PATCH).flatten(2).mT
        hidden = self.patch(tokens) + self.place(waves(places, 16, 32.0).flatten(1))
        for layer in self.layers:
            hidden = layer(hidden, condition, angle)
        velocity = self.head(self.norm(hidden)).mT.unflatten(2, (side, side))
        return F.pixel_shuffle(velocity, PATCH)


Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def velocity_of(model: Velocity, x: Tensor, time: Tensor, kind: Tensor, guidance: float) -> Tensor:
    """The velocity under classifier-free guidance, as one call of twice the batch."""
    if guidance == 1.0:
        return model(x, time, kind)
    none = torch.full_like(kind, KINDS)
    both = model(torch.cat([x, x]), torch.cat([time, time]), torch.cat([kind, none]))
    wanted, plain = both.chunk(2)
    return plain + guidance * (wanted - plain)


def noise_for(kind: Tensor, side: int, seed: int) -> Tensor:
    """Where sampling starts, the same in each run: [B, 3, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(kind), 3, side, side, generator=generator)


def pictures(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, side, side] from -1 to 1, and their classes [count].

    A background that changes from one colour to another, with shapes of a third colour in front.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    kind = torch.randint(KINDS, (count,), generator=generator)
    y, x = coordinates(side).mT.reshape(2, 1, side, side)
    start, end, front = (uniform(-1, 1, 3, 1, 1) for _ in range(3))
    turn = uniform(0, 2 * math.pi, 1, 1)
    slope = ((x - 0.5) * turn.cos() + (y - 0.5) * turn.sin() + 0.7) / 1.4
    picture = start + (end - start) * slope[:, None]
    soft = 1.5 / side

    def edge(distance: Tensor) -> Tensor:
        return torch.sigmoid(distance / soft * 2)

    row, column = uniform(0.25, 0.75, 1, 1), uniform(0.25, 0.75, 1, 1)
    size = uniform(0.12, 0.3, 1, 1)
    disc = edge(size - ((x - column) ** 2 + (y - row) ** 2).sqrt())
    square = edge(size - torch.maximum((x - column).abs(), (y - row).abs()))
    period = uniform(0.12, 0.3, 1, 1)
    along = (x * turn.sin() - y * turn.cos() + column) / period
    stripes = edge(((along - along.floor() - 0.5).abs() - 0.25) * period)
    far_x = (x / period + column).remainder(1) - 0.5
    far_y = (y / period + row).remainder(1) - 0.5
    dots = edge((0.3 - (far_x**2 + far_y**2).sqrt()) * period)
    shapes = torch.stack([disc, square, stripes, dots], 1)
    shape = shapes[torch.arange(count), kind][:, None]
    return (picture + (front - picture) * shape).clamp(-1, 1), kind
