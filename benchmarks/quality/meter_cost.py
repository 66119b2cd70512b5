"""What measuring and guarding a layer cost beside attention of it, in CPU time of one thread.

    python -m benchmarks.quality.meter_cost --length 8192 [--queries 512]

They are taken in turns in one process, the shortest of some runs of each. Queries and keys are
random: what the meter and the guard cost depends on sizes alone, and so does what the estimation of
union costs. The attention computes DENSITY of the cells, which is what texts keep at a promise of
0.01 (docs/accuracy.md), in a window, since random attention would keep all.
"""

from __future__ import annotations

import argparse
import json

import torch

from mpass.calibration.kernel_cost import seconds_of
from mpass.config.promise import pattern_for_loss
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.guard import guarded
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.meter import measure_call, rows_of_call
from mpass.patterns.a_shape import AShape

DENSITY = {2048: 0.43, 4096: 0.37, 8192: 0.29, 16384: 0.2, 32768: 0.12}
"""Share of the cells by the number of keys; those of other lengths are those of the next one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192, help="keys")
    parser.add_argument("--queries", type=int, default=0, help="of a chunk; 0 for a whole prompt")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heads, length, dim = arguments.heads, arguments.length, arguments.head_dim
    queries = arguments.queries or length
    query = torch.randn(1, heads, queries, dim).bfloat16()
    key, value = (torch.randn(1, arguments.kv_heads, length, dim).bfloat16() for _ in range(2))
    mask, scale = AttentionMask(query_offset=length - queries), dim**-0.5
    inputs = AttentionInputs(query, key, value, mask, scale)
    estimate = EstimateInputs(query, key, mask, range(heads), scale)
    promised = pattern_for_loss(0.01)
    share = DENSITY[min((n for n in DENSITY if n >= length), default=max(DENSITY))]
    seen = length - queries / 2  # keys that a query sees on average
    window = share * seen if queries < length else length * (1 - (1 - share) ** 0.5)
    index = AShape.estimate(estimate, [AShape(64, int(window))] * heads)
    lowering = choose_lowering(inputs)
    out = lowering.sparse_attention(inputs, index)

    def both() -> None:
        found = guarded(inputs, index, 0.999, measured=rows_of_call(query))
        measure_call(inputs, index, out, 1, dense=False, losses=found.losses)

    dense, estimation, sparse, meter, guard, together = seconds_of(
        [
            lambda: lowering.dense_attention(inputs),
            lambda: promised.estimate(estimate, [promised] * heads),
            lambda: lowering.sparse_attention(inputs, index),
            lambda: measure_call(inputs, index, out, 1, dense=False),
            lambda: guarded(inputs, index, 0.999),
            both,
        ],
        query.device,
        arguments.runs,
    )
    op = estimation + sparse
    line = {"length": length, "queries": queries, "density": share}
    times = {"dense": dense, "estimation": estimation, "sparse": sparse}
    line |= {f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in times.items()}
    for name, seconds in {"meter": meter, "guard": guard, "both": together}.items():
        line[f"{name}_ms"] = round(seconds * 1e3, 2)
        line[f"{name}_of_dense"] = round(seconds / dense, 4)
        line[f"{name}_of_op"] = round(seconds / op, 4)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
