"""Time forward and backward of sparse attention against torch's own, in one process, in turns.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py

prints, per dtype, the CPU seconds of a forward and backward pass (the least of the rounds), with
the estimation of the index in them, and the ratio. CPU time is used because ratios of it hold on a
machine that others use as well; with several threads it is their sum.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import mpass
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def blocks_for(density: float, length: int) -> int:
    """How many key blocks per query block make a share of the causal work."""
    blocks = length // 64
    total = blocks * (blocks + 1) / 2
    return next(
        k for k in range(1, blocks + 1) if (k * blocks - k * (k - 1) / 2) / total >= density
    )


def sparse(query: Tensor, key: Tensor, value: Tensor, top_k: int) -> Tensor:
    """What a compiled model runs: estimation, which has no gradient, and the attention."""
    pattern = mpass.BlockSparse(top_k)
    heads = list(range(query.shape[1]))
    given = (query.detach(), key.detach(), AttentionMask(), heads, query.shape[-1] ** -0.5)
    index: SparseIndex = type(pattern).estimate(EstimateInputs(*given), [pattern] * len(heads))
    return torch.ops.minference.sparse_attention_train.default(
        *(query, key, value, *index.tensors(), list(index.head_slots), None, None),
        *(0, 0, True, query.shape[-1] ** -0.5, 0.0, 1.0, 0, -1),
    )[0]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def seconds(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """CPU seconds of the forward and of the backward pass."""
    start = time.process_time()
    out = run()
    middle = time.process_time()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return middle - start, time.process_time() - middle


def main() -> None:
    options = arguments()
    top_k = blocks_for(options.density, options.length)
    print(
        f"{options.length} tokens, {options.heads} heads over {options.kv_heads}, D ="
        f" {options.head_dim}, {torch.get_num_threads()} threads, block_sparse({top_k})"
    )
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        leaves = [
            torch.randn(1, heads, options.length, options.head_dim, dtype=dtype).requires_grad_()
            for heads in (options.heads, options.kv_heads, options.kv_heads)
        ]
        query, key, _ = leaves
        share = mpass.density(query.detach(), key.detach(), pattern=mpass.BlockSparse(top_k))
        runs = {
            "sparse": functools.partial(sparse, *leaves, top_k),
            "dense": functools.partial(dense, *leaves),
        }
        sparse(*leaves, top_k).sum().backward()  # kernels are built here
        best: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, run in runs.items():
                found = seconds(run, leaves)
                best[name] = [min(pair) for pair in zip(best.get(name, found), found, strict=True)]
        ratio = sum(best["dense"]) / sum(best["sparse"])
        print(f"{dtype}: density {float(share.mean()):.3f}", end="")
        for name, (forward, backward) in best.items():
            print(f", {name} {forward:.3f} + {backward:.3f} s", end="")
        print(f", ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
