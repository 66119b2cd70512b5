"""Time attention under a trained mask against transformers' own dense code for it.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_mask_speed.py

Each query sees the `keep` keys of its prefix with the largest numbers (docs/training.md). Both are
given the same inputs, 4 query heads over 2 kv heads of size 64 in float32, and run in turns in one
process: forward and backward, CPU seconds of one thread, the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import mpass.lowering.dynamic_mask  # noqa: F401  (defines the op)

CASES = ((256, 64), (512, 64), (1024, 64), (1024, 256), (2048, 64), (2048, 1024), (4096, 256))
LOWEST = float(torch.finfo(torch.float32).min)
SCALE = 0.125


def written_out(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: int) -> Tensor:
    """The mask as transformers' Doge makes it, and SDPA."""
    rows = query.shape[2]
    unseen = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    mask = bias.expand(-1, -1, rows, -1).masked_fill(unseen, LOWEST)
    best = torch.topk(mask, keep, dim=-1, sorted=False).indices
    active = torch.zeros_like(mask).scatter(-1, best, 1.0)
    mask = mask.masked_fill(active == 0.0, LOWEST).repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )


def by_expiry(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: int) -> Tensor:
    """The op that mpass puts into graphs."""
    op = torch.ops.minference.dynamic_mask_attention.default
    out: Tensor = op(query, key, value, bias, None, keep, LOWEST, False, 0, SCALE)[0]
    return out


def seconds(attend: Callable[..., Tensor], leaves: list[Tensor], keep: int) -> tuple[float, float]:
    """CPU seconds of a forward and of a backward pass."""
    start = time.process_time()
    out = attend(*leaves, keep)
    between = time.process_time()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return between - start, time.process_time() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| tokens | keys kept | op, forward + backward | written out | ratio |")
    print("|---|---|---|---|---|")
    for length, keep in CASES:
        generator = torch.Generator().manual_seed(0)
        sizes = ((4, length, 64), (2, length, 64), (2, length, 64), (2, 1, length))
        leaves = [torch.randn(1, *size, generator=generator).requires_grad_() for size in sizes]
        times: dict[str, list[tuple[float, float]]] = {"op": [], "dense": []}
        for _ in range(rounds + 1):
            times["op"].append(seconds(by_expiry, leaves, keep))
            times["dense"].append(seconds(written_out, leaves, keep))
        best = {
            name: [min(own) for own in zip(*each[1:], strict=True)] for name, each in times.items()
        }
        words = {name: f"{own[0]:.3f} + {own[1]:.3f} s" for name, own in best.items()}
        ratio = sum(best["dense"]) / sum(best["op"])
        print(f"| {length} | {keep} | {words['op']} | {words['dense']} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
