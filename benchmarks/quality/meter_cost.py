"""What measuring and guarding a layer cost beside attention of it, in CPU time of one thread.

    python -m benchmarks.quality.meter_cost --length 8192

They are taken in turns in one process, the shortest of some runs of each. Queries and keys are
random, so that sparse attention is of no model; what the meter costs depends on sizes alone.
"""

from __future__ import annotations

import argparse
import json

import torch

from mpass.calibration.kernel_cost import seconds_of
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.guard import lost_too_much
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.meter import measure_call
from mpass.patterns.vertical_slash import VerticalSlash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heads, length, dim = arguments.heads, arguments.length, arguments.head_dim
    query = torch.randn(1, heads, length, dim).bfloat16()
    key, value = (torch.randn(1, arguments.kv_heads, length, dim).bfloat16() for _ in range(2))
    mask, scale = AttentionMask(), dim**-0.5
    inputs = AttentionInputs(query, key, value, mask, scale)
    pattern = VerticalSlash(256, 256)
    index = VerticalSlash.estimate(
        EstimateInputs(query, key, mask, range(heads), scale), [pattern] * heads
    )
    lowering = choose_lowering(inputs)
    out = lowering.sparse_attention(inputs, index)
    dense, sparse, meter, guard = seconds_of(
        [
            lambda: lowering.dense_attention(inputs),
            lambda: lowering.sparse_attention(inputs, index),
            lambda: measure_call(inputs, index, out, 1, dense=False),
            lambda: lost_too_much(inputs, index, 0.999),
        ],
        query.device,
        5,
    )
    print(
        json.dumps(
            {
                "length": length,
                "dense_ms": round(dense * 1e3, 2),
                "sparse_ms": round(sparse * 1e3, 2),
                "meter_ms": round(meter * 1e3, 2),
                "of_dense": round(meter / dense, 4),
                "guard_ms": round(guard * 1e3, 2),
                "guard_of_dense": round(guard / dense, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
