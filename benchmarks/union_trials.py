"""What was tried in the place of `union`'s rule: loss against density on real models and texts.

    python benchmarks/union_trials.py
    python benchmarks/union_trials.py --patterns "by_two_bands(row_share=0.03)" --texts alice

Each summary of run_summaries.py is a pattern, `by_mean` and so on, which chooses blocks as `union`
does but for that and for what its fields say: in plain torch (its seconds tell nothing), through
the public backend. Arguments and lines are those of frontier.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import frontier
import sympy
import torch
from run_summaries import SUMMARIES, Summary
from torch import Tensor

from mpass.lowering.estimators import Estimator
from mpass.lowering.index import BLOCK, IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import candidates, keep_mass, list_index
from mpass.lowering.reference.pooled_keys import row_scores
from mpass.lowering.reference.selection import largest
from mpass.lowering.reference.vertical_slash import last_query_sums
from mpass.patterns.base import HEAD_DIM, LENGTH, register_pattern
from mpass.patterns.base.checks import check_blocks
from mpass.patterns.base.scored import ListPattern

OUTPUT = Path(__file__).parent / "results" / "union_trials.jsonl"

TRIALS = (
    "union(mass=0.6, row_share=0.018)",
    "by_mean",
    "by_mean(row_share=0.03)",
    "by_integers",
    "by_projected(dims=32)",
    "by_two_bands",
    "by_two_bands(row_share=0.1)",
    "by_two_bands(mass=0.4, row_share=0.06)",
    "by_turned_back",
    "by_turned_back(row_share=0.03)",
    "by_longer_low",
    "by_longer_low(row_share=0.03)",
    "by_without_high(dims=8)",
)


@dataclass(frozen=True)
class TrialRule:
    """The fields of `UnionTrial`, and the scale of the attention."""

    summary: str
    mass: float
    row_share: float
    rows: int
    pool: int
    dims: int
    base: float
    shared: bool
    decay: float
    columns: int
    max_blocks: int
    scale: float = 1.0


def trial_width(rules: Sequence[TrialRule]) -> IndexWidth:
    return IndexWidth(
        max_blocks=max(rule.max_blocks for rule in rules),
        max_columns=max(rule.columns for rule in rules),
    )


def trial_index(
    inputs: EstimateInputs,
    rules: Sequence[TrialRule],
    summaries: Mapping[str, Summary] = SUMMARIES,
) -> SparseIndex:
    """As `mpass.lowering.reference.union.vertical_block_index`, but for what a rule says."""
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    group, scale = inputs.group, inputs.scale

    def summaries_of(head: int, rule: TrialRule) -> list[Any]:
        own = replace(rule, scale=scale)
        return summaries[rule.summary](query[:, head], key[:, head // group], mask, own)

    made: dict[int, list[Any]] = {}  # of the query heads of the head that is looked at

    def of_head(head: int, rule: TrialRule) -> list[Any]:
        if head not in made:
            if not rule.shared or head // group not in {other // group for other in made}:
                made.clear()
            made[head] = summaries_of(head, rule)
        return made[head]

    def kept_blocks(i: int, blocks: Tensor) -> Tensor:
        rule, head = rules[i], heads[i]
        first = head // group * group
        members = range(first, first + group) if rule.shared else [head]
        kept = torch.zeros((), dtype=torch.bool)
        for sums in zip(*(of_head(other, rule) for other in members), strict=True):
            found = [
                row_scores(*vectors, mask, blocks, scale=scale, rows=rule.rows, pool=rule.pool)
                for vectors in sums
            ]
            scores = torch.stack([own for own, _ in found]).mean(0)
            greatest = torch.stack([own for _, own in found]).mean(0)
            choice = candidates(
                query,
                key,
                mask,
                blocks,
                scores,
                sink_blocks=1,
                local_blocks=2,
                last_blocks=0,
                max_blocks=rule.max_blocks,
            )
            position = (blocks + 1) * BLOCK / (mask.query_offset + query.shape[2])
            least = rule.row_share * (rule.decay - (rule.decay - 1) * position)
            kept = kept | keep_mass(choice, rule.mass, greatest >= least[:, None])
        return kept

    sums, _ = last_query_sums(inputs, [16] * len(heads))
    columns = largest(sums, [rule.columns for rule in rules]) & (sums > 0)
    return list_index(query, mask, len(heads), trial_width(rules), kept_blocks, columns)


@dataclass(frozen=True)
class UnionTrial(ListPattern):
    """`union` with another rule; a subclass per summary of runs.

    dims: dimensions that a summary keeps or leaves out; base: of the rotary frequencies; shared:
    one index per kv group, from the mean scores of its query heads; decay: `row_share` is
    multiplied by this at the first query block, by 1 at the last, and linearly between; the rest as
    of `union`.
    """

    mass: float = 0.6
    row_share: float = 0.018
    rows: int = 16
    pool: int = 8
    dims: int = 32
    base: float = 1e5
    shared: bool = False
    decay: float = 1.0
    columns: int = 256
    max_blocks: int = 512

    summary: ClassVar[str]
    estimator: ClassVar[Estimator] = Estimator("trial", trial_index, trial_width, TrialRule)

    def __post_init__(self) -> None:
        check_blocks(self)

    def rule(self) -> TrialRule:
        return TrialRule(self.summary, **self.parameters())

    def cost(self) -> sympy.Expr:
        return LENGTH**2 * HEAD_DIM  # of no interest here


def register_trials() -> None:
    """A pattern `by_...` per summary."""
    for name in SUMMARIES:
        words = {"name": f"by_{name}", "summary": name, "__module__": __name__}
        register_pattern(dataclass(frozen=True)(type(f"By_{name}", (UnionTrial,), words)))


def main() -> None:
    words = sys.argv[1:]
    if "--patterns" not in words:
        words += ["--patterns", *TRIALS]
    if "--output" not in words:
        words += ["--output", str(OUTPUT)]
    sys.argv[1:] = words
    register_trials()
    frontier.main()


if __name__ == "__main__":
    main()
