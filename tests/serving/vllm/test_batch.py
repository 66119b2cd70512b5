"""Which requests of a batch are long prefills, and which rows are left."""

from __future__ import annotations

import itertools
import random

import pytest

from mpass.lowering.crossover import LeastLengths
from mpass.serving.vllm.batch import LongPrefill, Run, split_batch

LEAST = LeastLengths(keys=2048, queries=128)


def batch(*requests):
    """(starts, lengths) of requests, each (queries, keys before them)."""
    starts = [0, *itertools.accumulate(queries for queries, _ in requests)]
    return starts, [queries + context for queries, context in requests]


def test_a_long_prefill_among_short_ones_is_split_off():
    split = split_batch(*batch((300, 0), (6000, 0), (1, 5000), (400, 0)), LEAST)
    assert split.long == (LongPrefill(request=1, start=300, stop=6300, context=0),)
    assert split.rest == (Run(0, 1, 0, 300), Run(2, 4, 6300, 6701))


@pytest.mark.parametrize(
    "requests",
    [
        [(2047, 0)],
        [(127, 5000)],
        [(1, 9000), (1, 8000), (1, 3)],
        [(4, 9000)],
        [(0, 9000)],
        [],
    ],
    ids=["short prompt", "short chunk", "decoding", "drafts", "padding", "nothing"],
)
def test_a_batch_without_a_long_prefill_is_the_engines(requests):
    assert split_batch(*batch(*requests), LEAST) is None


def test_a_chunk_counts_the_keys_before_it():
    split = split_batch(*batch((128, 1920)), LEAST)
    assert split.long == (LongPrefill(0, 0, 128, 1920),)
    assert split.long[0].num_keys == 2048
    assert split.rest == ()


def test_a_chunk_must_be_worth_it_as_a_product_where_the_device_says_so():
    least = LeastLengths(keys=2048, queries=128, area=4096 * 2048)
    assert split_batch(*batch((1024, 4096)), least) is None
    assert split_batch(*batch((2048, 2048)), least) is not None
    assert split_batch(*batch((2100, 0)), least) is not None, "a whole prompt has no area to miss"


def test_a_single_query_is_never_split_off():
    assert split_batch(*batch((1, 500)), LeastLengths(keys=0, queries=0)) is None


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_part_and_in_order(seed):
    numbers = random.Random(seed)
    sizes = [(0, 3000), (1, 3000), (130, 10), (130, 2500), (2100, 0), (50, 0)]
    starts, lengths = batch(*numbers.choices(sizes, k=numbers.randint(1, 9)))
    split = split_batch(starts, lengths, LEAST)
    if split is None:
        return
    rows = sorted([(p.start, p.stop) for p in split.long] + [(r.start, r.stop) for r in split.rest])
    assert rows[0][0] == 0 and rows[-1][1] == starts[-1]
    assert all(one[1] == other[0] for one, other in itertools.pairwise(rows))
    for run in split.rest:
        assert (starts[run.first], starts[run.last]) == (run.start, run.stop)
    for part in split.long:
        assert part.num_keys == lengths[part.request]
