"""Where sparse attention is worth it on a GPU: from which lengths on, and at which densities.

Pure functions of a chip and of what an attention is, by the cost model. The promise that they keep
is that a prompt is never slower than `LEAST_SPEEDUP` times dense attention, as predicted.
"""

from __future__ import annotations

import functools
import math

from mpass.lowering.crossover import LayerWork, LeastLengths
from mpass.lowering.triton.chips import Chip
from mpass.lowering.triton.cost_model import expected_share, predict
from mpass.lowering.triton.estimator_costs import COSTS

LEAST_SPEEDUP = 0.97
"""Of what runs over dense attention, from `SHORTEST` tokens on: the promise."""

DENSER = 1.5
"""Prompts differ: sparse attention is taken where it is no slower even if this many times the
expected work is selected. SmolLM2 and Gemma differ by that much at 8192 tokens."""

SHORTEST, LONGEST = 128, 1 << 24
"""Tokens between which lengths are decided. Attention that does not pay up to the longest is taken
to pay from there on, where nothing was ever run."""

SURE = 1.12
"""Speed-up that sparse attention is predicted to have, at the share of the work that a prompt was
seen to select, before it is taken. Of 32768 plain tokens on an H200, 59% were selected, for which
as much time as dense attention's was predicted and 1.13 times as much measured
(benchmarks/results/gpu_h200_4.json)."""

STEPS = 8
"""Lengths that are looked at between a power of two and the next."""

PROBE_COST = 0.01
"""Share of dense attention's time that may go into looking whether sparse pays again."""

FEWEST_PROBES, MOST_PROBES = 4, 512
"""Dense calls between two looks, at least and at most."""


def lengths() -> tuple[int, ...]:
    """All lengths that are looked at, ascending."""
    steps = STEPS * int(math.log2(LONGEST / SHORTEST))
    found = (SHORTEST * 2 ** (step / STEPS) for step in range(steps + 1))
    return tuple(sorted({math.ceil(length / SHORTEST) * SHORTEST for length in found}))


def pays(chip: Chip, work: LayerWork, *, keys: int, queries: int | None = None) -> bool:
    """Whether sparse attention is no slower than dense, with room for prompts that are denser."""
    share = expected_share(work, keys, DENSER)
    return predict(chip, work, keys=keys, queries=queries, density=share).speedup >= 1.0


def known(work: LayerWork) -> bool:
    """Whether the costs of all estimators of a layer can be predicted."""
    return all(part.estimator in COSTS or not part.estimator for part in work.patterns)


@functools.lru_cache(maxsize=1024)
def least_lengths(chip: Chip, work: LayerWork) -> LeastLengths:
    """The shortest prompt, and the shortest chunk of one, from which sparse attention pays on.

    All longer ones pay as well, as far as lengths are looked at: chunks, where their queries times
    keys are no fewer than those of the shortest prompt. One batch row is counted: more of them hide
    fixed costs and do no harm.
    """
    tried = lengths()
    keys = LONGEST
    for length in reversed(tried):
        if not pays(chip, work, keys=length):
            break
        keys = length
    # What the launches take is fixed, and what dense attention does grows with queries times keys.
    queries, area = keys, keys**2
    for chunk in reversed([length for length in tried if length <= keys]):
        first = min((n for n in tried if n >= max(keys, area / chunk)), default=LONGEST)
        behind = [first, *(n for n in tried if n > first and n & (n - 1) == 0)]
        if not all(pays(chip, work, keys=length, queries=chunk) for length in behind):
            break
        queries = chunk
    return LeastLengths(keys, queries, area)


def calls_until_probe(speedup: float) -> int:
    """Dense calls after which one runs sparse to be measured again.

    speedup: that sparse attention was predicted to have at the share that was measured, below 1.
    What it loses is spread over so many calls that `PROBE_COST` of their time pays for it.
    """
    lost = 1.0 / max(speedup, 1e-3) - 1.0
    return min(MOST_PROBES, max(FEWEST_PROBES, math.ceil(lost / PROBE_COST)))
