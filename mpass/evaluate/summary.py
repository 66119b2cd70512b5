"""Means over the measurements of a task, and what they say about a pattern."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mpass.evaluate.plan import DENSE, LOSSES, SLIDING

COUNTED = 0.2
"""What the dense model solves less often than this at a length says nothing about sparsity."""

LARGEST_LOSS = 0.01
"""Nats per token over dense that a default may cost, over a window and over its last quarter."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """A task at a length with a pattern, over its samples.

    score: mean strict score, or the increase in nats per token over dense for losses; dense: the
    dense model's score, or its nats per token; counted: whether the dense model can do the task at
    all. Retrieval: loose, dense_loose: after dense decoding, None if that was not run. Losses:
    last_quarter: the increase there; divergence, agreement: as of `Losses`.
    """

    text: str
    task: str
    length: int
    pattern: str
    score: float
    dense: float
    density: float
    counted: bool
    loose: float | None = None
    dense_loose: float | None = None
    last_quarter: float | None = None
    divergence: float | None = None
    agreement: float | None = None


def summarize(lines: Iterable[Line]) -> list[Summary]:
    """Means over the samples of each text, task, length and pattern other than dense."""
    groups: dict[tuple[str, str, int, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["text"], line["task"], line["length"], line["pattern"]].append(line)
    summaries = []
    for (text, task, length, pattern), group in groups.items():
        if pattern != DENSE:
            make = summarize_losses if task in LOSSES else summarize_retrieval
            dense = groups[text, task, length, DENSE]
            summaries.append(make(text, task, length, pattern, group, dense))
    return summaries


def summarize_losses(
    text: str, task: str, length: int, pattern: str, group: list[Line], dense: list[Line]
) -> Summary:
    """Of sliding windows only the last quarters count."""

    def mean(of: Callable[[Line], float]) -> float:
        return statistics.fmean(map(of, group))

    last_dense = mean(lambda line: line["dense_quarters"][-1])
    last = mean(lambda line: line["sparse_quarters"][-1]) - last_dense
    whole_dense = mean(lambda line: line["dense"])
    whole = mean(lambda line: line["sparse"]) - whole_dense
    return Summary(
        text=text,
        task=task,
        length=length,
        pattern=pattern,
        score=last if task == SLIDING else whole,
        dense=last_dense if task == SLIDING else whole_dense,
        density=mean(lambda line: line["density"]),
        counted=True,
        last_quarter=last,
        divergence=mean(lambda line: line["divergence"]),
        agreement=mean(lambda line: line["agreement"]),
    )


def summarize_retrieval(
    text: str, task: str, length: int, pattern: str, group: list[Line], dense: list[Line]
) -> Summary:
    def mean(lines: list[Line], name: str) -> float:
        return statistics.fmean(line[name] for line in lines)

    generated = all("loose" in line for line in (*group, *dense))
    best = mean(dense, "score")
    return Summary(
        text=text,
        task=task,
        length=length,
        pattern=pattern,
        score=mean(group, "score"),
        dense=best,
        density=mean(group, "density"),
        counted=best >= COUNTED,
        loose=mean(group, "loose") if generated else None,
        dense_loose=mean(dense, "loose") if generated else None,
    )


@dataclass(frozen=True)
class Verdict:
    """A pattern over everything that was measured.

    density: mean; loss, last_quarter: the worst increase of any text and length, None if no text
    was measured; retention: strict score as a share of dense, of the counted task and length where
    it is least, None if dense can do none of them.
    """

    pattern: str
    density: float
    loss: float | None
    last_quarter: float | None
    retention: float | None

    @property
    def passes(self) -> bool:
        """Both gates of a default: the loss, and full strict retention. Nothing measured fails."""
        if self.loss is None or self.last_quarter is None or self.retention is None:
            return False
        return max(self.loss, self.last_quarter) <= LARGEST_LOSS and self.retention >= 1.0


def judge(summaries: Iterable[Summary]) -> list[Verdict]:
    """A verdict per pattern, the least dense first."""
    groups: dict[str, list[Summary]] = defaultdict(list)
    for summary in summaries:
        groups[summary.pattern].append(summary)
    return sorted(
        (judge_pattern(pattern, group) for pattern, group in groups.items()),
        key=lambda verdict: verdict.density,
    )


def judge_pattern(pattern: str, group: list[Summary]) -> Verdict:
    losses = [item for item in group if item.last_quarter is not None]
    tasks = [item for item in group if item.last_quarter is None and item.counted]
    return Verdict(
        pattern=pattern,
        density=statistics.fmean(item.density for item in group),
        loss=max((item.score for item in losses), default=None),
        last_quarter=max((item.last_quarter or 0.0 for item in losses), default=None),
        retention=min((item.score / item.dense for item in tasks), default=None),
    )
