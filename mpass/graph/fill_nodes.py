"""Ops behind an attention that give rows which see no key what eager attention gives them."""

from __future__ import annotations

import torch
from torch import fx

import mpass.lowering.ops  # (defines minference::fill_rows_without_keys)
import mpass.lowering.rows_before_keys  # noqa: F401  (defines minference::fill_rows_before_keys)
from mpass.graph.nodes import example
from mpass.graph.site import AttentionSite, MaskMeaning


def insert_fills(
    graph: fx.Graph,
    site: AttentionSite,
    mask: MaskMeaning,
    output: fx.Node,
    key_mask: fx.Node | None,
    offset: int | fx.Node,
) -> list[fx.Node]:
    """The ops that overwrite rows of a site's output, where any may be needed.

    site: with its bias beside query and key. output: [B, H, Nq, Dv], not laid out yet. Rows whose
    bias hides every key before them are looked for by numbers, and nothing may wait for those of a
    GPU: there such rows are padding. A backward pass knows of neither op; planning keeps sites
    dense that need the first, and rows of the second are padding in training.
    """
    created = []
    if mask.mean_of_hidden:
        fill = torch.ops.minference.fill_rows_without_keys.default
        created.append(graph.call_function(fill, (output, site.value, key_mask)))
    ahead, bias = site.ahead, site.key_bias
    trained = example(site.output).requires_grad
    if ahead is not None and bias is not None and not trained and is_on_cpu(site):
        arguments = (output, site.query, site.key, site.value, bias, site.bias_factor, offset)
        again = torch.ops.minference.fill_rows_before_keys.default
        numbers = (site.scale, ahead.number, ahead.how)
        created.append(graph.call_function(again, (*arguments, *numbers)))
    return created


def is_on_cpu(site: AttentionSite) -> bool:
    """Whether the numbers of a site's tensors can be read without waiting."""
    return example(site.query).device.type == "cpu"
