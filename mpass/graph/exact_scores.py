"""Why the scores of an attention stay exact where products of 8-bit numbers are asked for."""

from __future__ import annotations

from mpass.graph.nodes import example
from mpass.graph.site import AttentionSite
from mpass.lowering.dispatch import device_lowering


def exact_reason(site: AttentionSite, trained: bool, summaries: int, denoising: bool) -> str:
    """In words; "" if the scores of a site that becomes sparse are products of 8-bit numbers.

    trained: whether gradients are recorded; summaries, denoising: as planned for the site.
    """
    if trained:
        return "gradients are recorded"
    if site.kept is not None:
        return "the model itself chooses the keys"
    if site.distance_bias is not None:
        return "a bias by distance is added to them"
    if summaries:
        return "'summaries' needs exact sums"
    if denoising:
        return "'denoising' needs exact sums"
    return device_lowering(example(site.query).device).int8_reason(site.compute_dtype)
