"""A windowed layer of an encoder as ModernBERT has it: this backend beside Inductor's masked SDPA.

    python benchmarks/windowed_encoder.py --tokens 8192 --rounds 3

12 heads of 64, |query - key| <= 64, fp32. Prints the median CPU seconds of both in one thread,
taken in turn, and their largest difference.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import mpass

REACH = 64


def layer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention under a window that reaches as far ahead as back, its mask made in the graph."""
    places = torch.arange(query.shape[2])
    near = (places[:, None] - places).abs() <= REACH
    return F.scaled_dot_product_attention(query, key, value, attn_mask=near)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    operands = tuple(torch.randn(1, 12, args.tokens, 64) for _ in range(3))
    seconds: dict[str, list[float]] = {"inductor": [], "minference": []}
    results = {}
    compiled = {name: torch.compile(layer, backend=name, dynamic=False) for name in seconds}
    with torch.no_grad():
        for f in compiled.values():
            f(*operands)
        for _ in range(args.rounds):
            for name, f in compiled.items():
                begin = time.process_time()
                results[name] = f(*operands)
                seconds[name].append(time.process_time() - begin)
    print(mpass.last_report())
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.3f} CPU s")
    dense, sparse = (statistics.median(seconds[name]) for name in ("inductor", "minference"))
    difference = float((results["inductor"] - results["minference"]).abs().max())
    print(f"{dense / sparse:.1f}x, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
