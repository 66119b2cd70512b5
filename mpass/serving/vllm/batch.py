"""Which requests of a batch are long prefills, and which rows of the batch are left to vLLM.

A batch of vLLM is one tensor of query rows, request after request: whole prompts, chunks of
prompts after what is cached of them, and single rows of requests that decode, in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mpass.lowering.crossover import LeastLengths


@dataclass(frozen=True, slots=True)
class LongPrefill:
    """A request whose prefill may be sparse.

    request: its number in the batch; start, stop: its rows; context: keys before its first query,
    of chunks that came earlier or of a cached prefix.
    """

    request: int
    start: int
    stop: int
    context: int

    @property
    def num_keys(self) -> int:
        """Keys up to its last query."""
        return self.context + self.stop - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """Requests `first` to `last` - 1, of rows `start` to `stop` - 1, for the engine's attention."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Split:
    """A batch in two kinds of parts, each in the batch's order; together they hold every row."""

    long: tuple[LongPrefill, ...]
    rest: tuple[Run, ...]


def split_batch(starts: Sequence[int], lengths: Sequence[int], least: LeastLengths) -> Split | None:
    """Split a batch; None if no request is a long prefill.

    starts: the first row of each request, and the number of rows: [requests + 1].
    lengths: the keys of each request, its queries among them: [requests]. Of rows that decode they
        may be too large, as the host knows them where drafts are verified.
    least: from how many keys and queries on an attention is sparse.
    """
    long = []
    for request, (start, stop) in enumerate(itertools.pairwise(starts)):
        context = lengths[request] - (stop - start)
        if pays(stop - start, context, least):
            long.append(LongPrefill(request, start, stop, context))
    if not long:
        return None
    # The requests between two long ones, before the first and after the last.
    edges = [-1, *(part.request for part in long), len(starts) - 1]
    between = ((before + 1, after) for before, after in itertools.pairwise(edges))
    rest = (Run(first, last, starts[first], starts[last]) for first, last in between)
    return Split(tuple(long), tuple(run for run in rest if run.start < run.stop))


def pays(num_queries: int, context: int, least: LeastLengths) -> bool:
    """Whether a request is long enough: its keys, its queries, and of a chunk their product."""
    num_keys = context + num_queries
    if context < 0 or num_queries < max(2, least.queries) or num_keys < least.keys:
        return False
    return context == 0 or num_queries * num_keys >= least.area
