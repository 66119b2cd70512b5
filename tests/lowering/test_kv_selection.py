"""What a cache keeps of a prompt: SnapKV's rule by loops, and who hears of it."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

import mpass
from mpass.errors import OptionValueError
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.kv_selection import select_keys
from mpass.options import parse_options
from tests.helpers.truth import random_attention

LENGTH, SCALE = 150, 0.3


def truth(query, key, first, last, offset, *, budget, window, kernel, pool, by_length):
    """The positions that one batch row keeps per kv head, written out. query [H, Nq, D].

    first, last: positions of its first and last real key.
    """
    group = query.shape[0] // key.shape[0]
    looking = range(max(first, offset, last - window + 1), last + 1)
    begin = last - window + 1  # of the window, which is kept whole
    kept = []
    for kv_head in range(key.shape[0]):
        scores = torch.zeros(key.shape[1])
        for head in range(kv_head * group, (kv_head + 1) * group):
            sums = torch.zeros(key.shape[1])
            for position in looking:
                seen = slice(first, position + 1)
                logits = key[kv_head, seen] @ query[head, position - offset] * SCALE
                sums[seen] += logits.softmax(-1) * (len(logits) if by_length else 1)
            sums[max(0, begin) :] = 0.0
            for j in range(first, begin):
                near = [
                    sums[i] if 0 <= i < len(sums) else torch.tensor(0.0)
                    for i in range(j - kernel // 2, j + kernel // 2 + 1)
                ]
                scores[j] += max(near) if pool == "max" else sum(near) / kernel
        own = list(range(max(first, begin), last + 1))
        others = sorted(range(first, max(first, begin)), key=lambda j: -float(scores[j]))
        kept.append(sorted(own + others[: max(0, budget - len(own))]))
    return kept


@pytest.mark.parametrize(("pool", "by_length"), [("avg", False), ("max", False), ("avg", True)])
@pytest.mark.parametrize(
    ("offset", "padded", "budget"), [(0, False, 40), (70, False, 40), (0, True, 40), (0, True, 130)]
)
def test_a_cache_keeps_the_last_queries_and_what_they_attend_to(
    offset, padded, budget, pool, by_length
):
    query, key, _ = random_attention(
        2, num_queries=LENGTH - offset, num_keys=LENGTH, head_dim=16, seed=3
    )
    key_mask, bounds = None, [(0, LENGTH - 1)] * 2
    if padded:
        key_mask = torch.ones(2, LENGTH, dtype=torch.bool)
        key_mask[0, :37] = False
        key_mask[1, 120:] = False
        bounds = [(37, LENGTH - 1), (0, 119)]
    mask = AttentionMask(query_offset=offset, key_mask=key_mask)
    inputs = EstimateInputs(query, key, mask, range(query.shape[1]), SCALE)
    rule = {"budget": budget, "window": 16, "kernel": 5, "pool": pool, "by_length": by_length}
    found = select_keys(inputs, **rule)
    assert found.shape == (2, key.shape[1], budget) and found.dtype == torch.int32
    for row, (first, last) in enumerate(bounds):
        expected = truth(query[row], key[row], first, last, offset, **rule)
        for own, positions in zip(found[row].tolist(), expected, strict=True):
            assert own == positions + [-1] * (budget - len(positions))


def test_more_window_than_queries_keeps_the_keys_before_them_too():
    """A last chunk of 4 tokens has 4 queries to look, and 16 keys are kept unseen."""
    query, key, _ = random_attention(1, num_queries=4, num_keys=LENGTH, head_dim=16)
    inputs = EstimateInputs(query, key, AttentionMask(query_offset=LENGTH - 4), range(4), SCALE)
    found = select_keys(inputs, budget=20, window=16, kernel=1, pool="avg")
    assert (found[..., -16:] == torch.arange(LENGTH - 16, LENGTH)).all()
    assert (found.diff(dim=-1) > 0).all()


def test_what_stands_around_a_key_that_is_looked_at_is_kept_by_default():
    """A question looks for the first token of a number; those after it are looked for later."""
    key = torch.zeros(1, 1, 400, 16)
    key[0, 0, 200, 0] = 60.0
    query = torch.zeros(1, 1, 400, 16)
    query[..., 0] = 1.0
    inputs = EstimateInputs(query, key, AttentionMask(), range(1), SCALE)
    for rule, reach in ((mpass.SnapKV(budget=64 + 21), 10), (mpass.SnapKV(64 + 5, kernel=5), 2)):
        kept = select_keys(inputs, **asdict(rule))[0, 0].tolist()
        assert kept == [*range(200 - reach, 201 + reach), *range(400 - 64, 400)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": 32}, "SnapKV.budget' is 32; allowed: an int >= 64"),
        ({"window": 0}, "SnapKV.window' is 0"),
        ({"kernel": 4}, "an odd number"),
        ({"pool": "sum"}, "avg, max"),
        ({"by_length": 1}, "True or False"),
    ],
)
def test_a_number_that_cannot_be_is_named(values, words):
    with pytest.raises(OptionValueError, match=words):
        mpass.SnapKV(**values)


def test_a_listener_takes_a_rule_and_nothing_else():
    with pytest.raises(OptionValueError, match="rule"), mpass.select_keys(64):
        pass


def test_the_option_takes_nothing_else():
    with pytest.raises(OptionValueError, match="kv_select"):
        parse_options(None, {"kv_select": 1024})
