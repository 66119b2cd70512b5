"""A diffusion sampler whose attention is whole at some steps and sparse, with a residual, between.

    python examples/denoising.py

The model has random weights. The steps are told by the loop; with a pipeline of diffusers they are
told by its scheduler: `mpass.denoising(steps=50, scheduler=pipe.scheduler)`.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

import mpass


class Layer(nn.Module):
    """Attention that sees both ways, and nothing else."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, N, width]."""
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(seen.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two of these layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(128, 2), Layer(128, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, N, 128]."""
        for layer in self.layers:
            x = layer(x)
        return x


def main(tokens: str = "4096", steps: str = "20") -> None:
    """Sample densely, with residuals and without, from the same noise."""
    torch.manual_seed(0)
    model = Model().eval()
    noise = torch.randn(1, int(tokens), 128)
    count = int(steps)

    def sample(run: mpass.DenoisingRun | None = None) -> torch.Tensor:
        x = noise
        with torch.no_grad():
            for _ in run.over(range(count)) if run else range(count):
                x = x - model(x) / count
        return x

    dense = sample()
    window = int(tokens) // 8  # to both sides: a quarter of the keys
    mpass.compile(
        model, pattern=f"a_shape(0, {window})", denoising=True, min_seq_len=512, dense_above=2.0
    )
    for keep in ("residual", "nothing"):
        with mpass.denoising(count, full=2, every=6, keep=keep) as run, mpass.record() as log:
            out = sample(run)
        error = (out - dense).norm() / dense.norm()
        print(f"{keep}: {log.density():.0%} of the cells, relative difference {error:.4f}")
    print(mpass.last_report())


if __name__ == "__main__":
    main(*sys.argv[1:])
