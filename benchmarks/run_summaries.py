"""Ways to stand for a run of keys by one vector: what was tried in the place of `union`'s mean.

Each makes of one head's queries [B, Nq, D] and keys [B, Nk, D] vectors q' [B, Nq, D'] and m'
[B, S, D'], whose product is the logit of a run, and the number of keys of each run [B, S]. So the
rule that chooses blocks is the same for all. Letters: B batch, Nq queries, Nk keys, S runs, D
head_dim, D' whatever a summary takes.

Rotary embeddings turn the pair of dimensions (i, i + D / 2) by `position * base ** (-2 * i / D)`:
a small i is a high frequency, which a mean over positions cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask
from mpass.lowering.reference.pooled_keys import pooled_keys

Vectors = tuple[Tensor, Tensor, Tensor]
"""q', m' and the number of keys of each run."""

Summary = Callable[[Tensor, Tensor, AttentionMask, Any], list[Vectors]]
"""(query, key, mask, rule) -> one softmax each; blocks that any of them keeps are kept."""


def mean(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """The mean, as `union` does."""
    return [(query.float(), *pooled_keys(key, mask, rule.pool))]


def integers(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """Means and queries rounded to 8 bits by their greatest number, means less what all share.

    What all means share moves all logits of a row alike, so that a softmax does not see it
    (SageAttention, arXiv 2410.02367, section 4.2).
    """
    (_, means, counts) = mean(query, key, mask, rule)[0]
    return [(to_integers(query.float()), to_integers(centred(means, counts)), counts)]


def centred(means: Tensor, counts: Tensor) -> Tensor:
    """Means of runs less the mean of all keys; runs without keys stay 0."""
    share = (counts / counts.sum(-1, keepdim=True).clamp(min=1))[..., None]
    return (means - (share * means).sum(1, keepdim=True)) * (counts > 0)[..., None]


def to_integers(rows: Tensor) -> Tensor:
    """Rows [..., D] with 255 levels each, as numbers of the size that they had."""
    step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return (rows / step).round() * step


def projected(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """Means and queries in the `dims` dimensions that hold most of their products' variance.

    With queries' second moments Q = L L^T and means' covariance M: q . m = (L^-1 q) . (L^T m), and
    the best dimensions are the leading eigenvectors of L^T M L.
    """
    (_, means, counts) = mean(query, key, mask, rule)[0]
    query, means = query.float(), centred(means, counts)
    moments = query.mT @ query / query.shape[1]
    moments += moments.diagonal(dim1=1, dim2=2).mean() * 1e-4 * torch.eye(query.shape[2])
    factor = torch.linalg.cholesky(moments)
    spread = factor.mT @ (means.mT @ means) @ factor
    best = torch.linalg.eigh(spread).eigenvectors[..., -rule.dims :]
    white = torch.linalg.solve_triangular(factor, query.mT, upper=False).mT
    return [(white @ best, means @ factor @ best, counts)]


def variance(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """The mean, and half the variance of each coordinate on its square: log of sum to 2nd order."""
    (_, means, counts) = mean(query, key, mask, rule)[0]
    squares = pooled_keys(key.float().square(), mask, rule.pool)[0]
    spread = (squares - means.square()).clamp(min=0)
    scaled = query.float().square() * (rule.scale / 2)
    return [(torch.cat([query.float(), scaled], -1), torch.cat([means, spread], -1), counts)]


def two_means(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """Two clusters per two runs, by the sides of their mean seen from the key farthest from it."""
    run = 2 * rule.pool
    means, _ = pooled_keys(key, mask, run)
    tail = means.shape[1] * run - key.shape[1]
    keys = torch.nn.functional.pad(key.float(), (0, 0, 0, tail)).unflatten(1, (-1, run))
    real = torch.arange(means.shape[1] * run).view(1, -1, run) < key.shape[1]
    away = keys - means[:, :, None]
    far = (away.square().sum(-1) * real).argmax(-1)
    axis = away.gather(2, far[..., None, None].expand(-1, -1, 1, keys.shape[-1]))
    side = ((away * axis).sum(-1) > 0) & real
    vectors, sizes = [], []
    for own in (side, ~side & real):
        size = own.sum(-1).float()
        vectors.append((keys * own[..., None]).sum(2) / size.clamp(min=1)[..., None])
        sizes.append(size)
    means, counts = torch.stack(vectors, 2).flatten(1, 2), torch.stack(sizes, 2).flatten(1)
    return [(query.float(), means, counts)]


def two_bands(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """Two softmaxes, over the lower frequencies and over the higher ones, each with a temperature.

    Prism (rotary-band pooling): halves of the pairs, three quarters for the low band; a band's
    logits are divided by sqrt(share of dimensions) * (its rms / rms) of queries and of means.
    """
    (_, means, counts) = mean(query, key, mask, rule)[0]
    query, found = query.float(), []
    half = query.shape[2] // 2
    for first, stop in ((0, half // 2), (half // 4, half)):
        pairs = torch.cat([torch.arange(first, stop), torch.arange(half + first, half + stop)])
        own_query, own = query[..., pairs], means[..., pairs]
        heat = (len(pairs) / query.shape[2]) ** 0.5
        heat *= (rms(own_query) / rms(query) * rms(own) / rms(means)).item()
        found.append((own_query / heat, own, counts))
    return found


def rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def without_high(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """The mean without the `dims` dimensions of highest frequency."""
    (_, means, counts) = mean(query, key, mask, rule)[0]
    half, drop = query.shape[2] // 2, rule.dims // 2
    pairs = torch.cat([torch.arange(drop, half), torch.arange(half + drop, 2 * half)])
    return [(query.float()[..., pairs], means[..., pairs], counts)]


def turned_back(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """The mean of keys turned to the middle of their run: rotation cancels nothing."""
    half = key.shape[2] // 2
    frequency = rule.base ** (-torch.arange(half) / half)
    inside = torch.arange(key.shape[1]) % rule.pool - (rule.pool - 1) / 2
    cos, sin = (inside[:, None] * frequency).cos(), (inside[:, None] * frequency).sin()
    low, high = key.float().split(half, -1)
    turned = torch.cat([low * cos + high * sin, high * cos - low * sin], -1)
    return [(query.float(), *pooled_keys(turned, mask, rule.pool))]


def longer_low(query: Tensor, key: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
    """The mean, its lower half of frequencies over runs twice as long: less to multiply."""
    (_, means, counts) = mean(query, key, mask, rule)[0]
    coarse = pooled_keys(key, mask, 2 * rule.pool)[0].repeat_interleave(2, 1)
    half = key.shape[2] // 2
    low = (torch.arange(2 * half) % half) >= half // 2
    return [(query.float(), torch.where(low, coarse, means), counts)]


SUMMARIES: dict[str, Summary] = {
    own.__name__: own
    for own in (
        mean,
        integers,
        projected,
        variance,
        two_means,
        two_bands,
        without_high,
        turned_back,
        longer_low,
    )
}
