"""Summaries of runs of keys that were tried: each is what it says where that can be seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.run_summaries import SUMMARIES
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference.pooled_keys import pooled_keys

DIM, MASK = 16, AttentionMask()


def rule(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"pool": 8, "dims": 8, "base": 1e4, "scale": 0.25} | fields))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 64, DIM, generator=generator)
    return query, torch.randn(2, 256, DIM, generator=generator)


def weights(name: str, inputs: tuple[Tensor, Tensor], **fields: Any) -> list[Tensor]:
    """Softmax over runs, [B, Nq, S], one per softmax of the summary."""
    found = SUMMARIES[name](*inputs, MASK, rule(**fields))
    return [(q @ m.mT * 0.25 + n.log()[:, None]).softmax(-1) for q, m, n in found]


@pytest.mark.parametrize("name", SUMMARIES)
def test_every_run_has_a_logit_and_its_number_of_keys(
    name: str, inputs: tuple[Tensor, Tensor]
) -> None:
    for query, means, counts in SUMMARIES[name](*inputs, MASK, rule()):
        assert query.shape[1] == 64 and query.shape[2] == means.shape[2]
        assert means.shape[1] == counts.shape[1] == 32
        assert counts.sum(-1).tolist() == [256, 256]


@pytest.mark.parametrize(
    ("name", "fields", "atol"),
    [
        ("projected", {"dims": DIM}, 1e-5),  # all dimensions
        ("integers", {}, 2e-3),
        ("without_high", {"dims": 0}, 1e-7),  # none left out
    ],
)
def test_what_changes_little_weighs_runs_as_means_do(
    name: str, fields: dict[str, Any], atol: float, inputs: tuple[Tensor, Tensor]
) -> None:
    (expected,), (found,) = weights("mean", inputs), weights(name, inputs, **fields)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["turned_back", "variance"])
def test_runs_of_one_key_are_that_key(name: str, inputs: tuple[Tensor, Tensor]) -> None:
    (expected,), (found,) = weights("mean", inputs, pool=1), weights(name, inputs, pool=1)
    torch.testing.assert_close(found, expected)


def test_turned_keys_that_are_equal_but_for_their_rotation_keep_their_length() -> None:
    position, frequency = torch.arange(64.0), 1e4 ** (-torch.arange(DIM / 2) / (DIM / 2))
    angle = position[:, None] * frequency
    key = torch.cat([angle.cos(), angle.sin()], -1)[None]
    ((_, turned, _),) = SUMMARIES["turned_back"](key, key, MASK, rule())
    ((_, means, _),) = SUMMARIES["mean"](key, key, MASK, rule())
    torch.testing.assert_close(turned.norm(dim=-1), key.norm(dim=-1)[:, ::8])
    assert (means.norm(dim=-1) < 0.95 * turned.norm(dim=-1)).all()


def test_two_means_are_those_of_clusters_far_apart() -> None:
    near = torch.zeros(1, 64, DIM)
    near[0, ::4, 0] = 10.0
    ((_, means, counts),) = SUMMARIES["two_means"](near, near, MASK, rule())
    assert sorted(set(counts.flatten().tolist())) == [4, 12]
    assert sorted(set(means[..., 0].flatten().tolist())) == [0, 10]


def test_longer_runs_stand_for_low_frequencies_alone(inputs: tuple[Tensor, Tensor]) -> None:
    ((_, means, _),) = SUMMARIES["longer_low"](*inputs, MASK, rule())
    fine, _ = pooled_keys(inputs[1], MASK, 8)
    coarse, _ = pooled_keys(inputs[1], MASK, 16)
    low = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    high = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    torch.testing.assert_close(means[..., low], coarse.repeat_interleave(2, 1)[..., low])
    torch.testing.assert_close(means[..., high], fine[..., high])


def test_bands_are_the_halves_of_the_frequencies(inputs: tuple[Tensor, Tensor]) -> None:
    (_, high, _), (_, low, _) = SUMMARIES["two_bands"](*inputs, MASK, rule())
    means, _ = pooled_keys(inputs[1], MASK, 8)
    torch.testing.assert_close(high, means[..., [0, 1, 2, 3, 8, 9, 10, 11]])
    torch.testing.assert_close(low, means[..., [2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15]])
