"""What to do with each attention: an AttentionPlan, or a Skip that tells why it stays dense.

Nothing here edits a graph. A guard on the prompt's length may be installed, see `long_enough`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import Max, Min

from mpass.config.promise import promised_share
from mpass.errors import ConfigMismatchError
from mpass.graph.dtypes import dtype_reason
from mpass.graph.exact_scores import exact_reason
from mpass.graph.nodes import example, number_now, shape_of
from mpass.graph.numbers import meter_number
from mpass.graph.site import AttentionSite, Length, MaskMeaning
from mpass.graph.sizes import holds, is_unbacked, may_guard
from mpass.graph.tile_nodes import grid_of
from mpass.lowering.crossover import LeastLengths
from mpass.lowering.device import REFERENCE
from mpass.lowering.dispatch import choose_lowering, device_lowering, reason_against
from mpass.lowering.key_bias import bias_channels
from mpass.lowering.kv_selection import SnapKV
from mpass.lowering.tiles import Grid
from mpass.match.top_keys import KEPT_SHORTEST, kept_reason
from mpass.options import Options
from mpass.patterns.base import Pattern
from mpass.patterns.base.registry import serving_both_ways
from mpass.patterns.base.work import layer_work
from mpass.patterns.dense import Dense
from mpass.resolve import BUILTIN, PROMISED, ResolvedPatterns, resolve_site

FOLDS = (sympy.Add, sympy.Mul, Max, Min)
"""What lengths are made by that the rewrite can build."""

MAX_HEAD_DIM = 256

ONE_QUERY = "one query: there is nothing to skip"
"""Why a call of a single query (decoding, pooling) stays dense, whatever else could be said."""
UNKNOWN_SIZE = "a size is known at run time only ({}, as Tensor.item() gives it)"

FEWEST_QUERIES = 128
"""A chunk of fewer queries stays dense: packing the keys would cost as much as it saves."""

LARGEST = torch.finfo(torch.float32).max
"""The largest scale of scores that is a number in fp32, which the kernels compute in."""


@dataclass(frozen=True)
class AttentionPlan:
    """A site that becomes sparse: the pattern of each query head, and how the op decides.

    A site whose mask is not proven has a `mask_tensor` that is read at run time.
    min_seq_len: 0 where a guard on the graph has decided already; else the op compares at run time.
    config_source: which decorator, option or file named the patterns.
    shortest: the keys from which on it is sparse, whoever compares.
    training: whether gradients are recorded, so that the op is one with a backward.
    summaries: keys per mean of what is left out; 0 for none.
    measured: the number by which the meter keeps what it loses; 0 where nothing is measured.
    kv_select: how it selects the keys that a cache keeps; None for not at all.
    causal_only: whether a mask that, read at run time, turns out to see both ways leaves it dense.
    most_lost: the share of a head's attention that a call may lose before it runs dense; 1 for all.
    grid: in whose tiles it sees its tokens; None for their own order.
    denoising: whether what it leaves out is kept over the steps of a sampler.
    int8: whether scores are products of 8-bit numbers.
    """

    site: AttentionSite
    patterns: tuple[Pattern, ...]
    dense_above: float
    min_seq_len: int
    config_source: str = ""
    shortest: int | None = None
    training: bool = False
    summaries: int = 0
    measured: int = 0
    causal_only: bool = False
    kv_select: SnapKV | None = None
    most_lost: float = 1.0
    denoising: bool = False
    int8: bool = False
    grid: Grid | None = None


@dataclass(frozen=True)
class Skip:
    """A site that stays as it is, with the reason in words."""

    site: AttentionSite
    reason: str
    config_source: str = ""


def plan_attention(site: AttentionSite, options: Options) -> AttentionPlan | Skip:
    """Decide about one site. Raises ConfigMismatchError if the config is for another model."""
    if is_single_query(site):
        return Skip(site, ONE_QUERY)
    site = with_read_mask(site, options)
    reason = reason_to_skip(site) or training_reason(site)
    if reason:
        return Skip(site, reason)
    try:
        resolved = resolve_site(site, options)
    except ConfigMismatchError as error:
        if site.mask is not None and site.mask.causal:
            raise
        # A vision tower beside the language model that the config is for, most likely.
        known = "not causal" if site.mask is not None else "it is not known to be causal"
        return Skip(site, f"{known}, and {error}")
    site = dataclasses.replace(site, layer=resolved.layer)
    resolved = with_exact_windows(site, resolved)
    reason = pattern_reason(site, resolved) or steps_reason(site, options)
    if reason:
        return Skip(site, reason, resolved.source)
    return decide_length(site, resolved, options)


def with_read_mask(site: AttentionSite, options: Options) -> AttentionSite:
    """The site with its mask to be read at run time where it is not proven, or not at all.

    Reading makes the host wait for what it decides, so it is for lowerings that decide so anyway.
    """
    if site.mask_tensor is None:
        return site
    mask = site.mask
    if mask is not None and not isinstance(mask.query_offset, fx.Node):
        return dataclasses.replace(site, mask_tensor=None)
    lowering = device_lowering(example(site.query).device)
    if not options.read_masks or not lowering.decides_by_cost:
        return dataclasses.replace(site, mask_tensor=None)
    unproven = site.unproven or "the position of the first query is a tensor"
    return dataclasses.replace(site, mask=None, unproven=unproven)


def reason_to_skip(site: AttentionSite) -> str:
    """Why this site cannot be sparse whatever its length, or the empty string."""
    if site.dense_reason:
        return site.dense_reason
    if not abs(site.scale) <= LARGEST:
        return f"scale is {site.scale:g}: scores are no numbers"
    query, key, value = (example(node) for node in (site.query, site.key, site.value))
    reason = dtype_reason(site) or kept_reason(site)
    if reason:
        return reason
    if device_lowering(query.device) is REFERENCE:
        return f"no kernels are generated for device {query.device.type!r}"
    if any(not isinstance(n, int) for n in (site.num_heads, site.num_kv_heads, site.head_dim)):
        return "the numbers of heads and head_dim must be known when compiling"
    if site.num_heads % site.num_kv_heads:
        return f"{site.num_heads} query heads do not divide over {site.num_kv_heads} kv heads"
    head_dim = site.head_dim
    if site.key_bias is not None:
        heads = (site.num_heads, site.num_kv_heads, site.num_heads)
        head_dim += bias_channels(site.compute_dtype, *heads)
    if max(head_dim, int(value.shape[-1])) > MAX_HEAD_DIM:
        return f"head_dim {max(head_dim, int(value.shape[-1]))} is over {MAX_HEAD_DIM}"
    reason = reason_against(site.inputs())
    if reason:
        return reason
    if site.read_mask is not None:
        sizes = (*query.shape, *key.shape, *value.shape)
        unknown = next((size for size in sizes if is_unbacked(size)), None)
        return "" if unknown is None else UNKNOWN_SIZE.format(unknown)
    if site.mask is None:
        return site.unproven or "its mask is not proven"
    if isinstance(site.mask.query_offset, fx.Node):
        return "the position of the first query is a tensor: it is known only at run time"
    num_queries, num_keys = query.shape[2], key.shape[2]
    sizes = (*query.shape, *key.shape, *value.shape, site.mask.query_offset, site.mask.valid_keys)
    unknown = next((size for size in sizes if is_unbacked(size)), None)
    if unknown is not None:
        return UNKNOWN_SIZE.format(unknown)
    for length in (site.mask.query_offset, site.mask.valid_keys):
        if isinstance(length, torch.SymInt) and not can_be_built(length.node.expr):
            return f"a length of the mask, {length}, is not made of the graph's sizes"
    if site.mask.valid_keys is not None and not is_served(site.mask, num_queries, num_keys):
        return (
            f"{length_in_words(site.mask.valid_keys)} valid keys of {length_in_words(num_keys)}: "
            "none, too many, or fewer than the queries' positions"
        )
    end = site.mask.query_offset + num_queries
    if site.mask.causal and not holds(end <= num_keys, end, num_keys):
        return (
            f"queries may stand after the last key: {length_in_words(num_queries)} queries from "
            f"position {length_in_words(site.mask.query_offset)} on over "
            f"{length_in_words(num_keys)} keys"
        )
    return ""


def is_trained(site: AttentionSite) -> bool:
    """Whether gradients of the site are recorded; matchers say if that keeps it dense."""
    return bool(example(site.output).requires_grad)


def training_reason(site: AttentionSite) -> str:
    """Why a site whose gradients are recorded has no sparse backward pass, or the empty string."""
    if not is_trained(site):
        return ""
    query = example(site.query)
    if choose_lowering(site.inputs()).attention_backward is None:
        return f"no backward kernels are generated for device {query.device.type!r}"
    if site.distance_bias is not None and not device_lowering(query.device).trains_bias:
        return f"no gradient of a bias by distance is computed on device {query.device.type!r}"
    if site.read_mask is not None:
        return "trained under a mask that is read at run time: that op has no backward"
    if site.listed is not None:
        return "trained under lists of blocks: that op has no backward"
    if site.mask is not None and site.mask.mean_of_hidden:
        return "trained where rows without a key get a mean: that op has no backward"
    return ""


def is_single_query(site: AttentionSite) -> bool:
    """Whether a site has one query, so that no other reason to stay dense matters."""
    shape = shape_of(site.query)
    if site.rows is not None:
        return bool(statically_known_true(site.rows == 1))
    return len(shape) == 4 and bool(statically_known_true(shape[2] == 1))


def is_served(mask: MaskMeaning, num_queries: Length, num_keys: Length) -> bool:
    """Whether a length of valid keys can be cut off: by what is known, else by a guard."""
    valid: Any = mask.valid_keys
    offset: Any = mask.query_offset
    least = offset + num_queries if mask.causal else 1
    sizes = (valid, offset, num_queries, num_keys)
    return holds(valid >= least, *sizes) and holds(valid <= num_keys, *sizes)


def with_exact_windows(site: AttentionSite, resolved: ResolvedPatterns) -> ResolvedPatterns:
    """The patterns of a site, but for a window that reaches both ways: all of it is computed.

    Estimators know windows of causal attention only, and there is little to leave out.
    """
    mask = site.mask
    if mask is None or mask.causal or not mask.window:
        return resolved
    return dataclasses.replace(resolved, patterns=(Dense(),) * len(resolved.patterns))


def pattern_reason(site: AttentionSite, resolved: ResolvedPatterns) -> str:
    """Why the patterns that the site got keep it dense, or the empty string."""
    causal = site.mask is None or site.mask.causal
    other = sorted({p.name for p in resolved.patterns if not p.bidirectional})
    if not causal and other:
        return (
            f"not causal: {', '.join(other)} is defined for causal attention only; "
            f"{serving_both_ways()} serve it"
        )
    blind = sorted({p.name for p in resolved.patterns if is_blind(p, site)})
    if blind:
        return f"a bias by distance is not seen by {', '.join(blind)} on this device"
    windowed = site.mask is not None and site.mask.window
    if windowed or any(pattern.name != "dense" for pattern in resolved.patterns):
        return ""
    if not causal and resolved.source.startswith((BUILTIN, PROMISED)):
        others = serving_both_ways()
        return f"not causal: dense by default, since such attention is diffuse; {others} serve it"
    return "the config keeps every head of this layer dense"


def is_blind(pattern: Pattern, site: AttentionSite) -> bool:
    """Whether a pattern would be estimated without the bias by distance that a site has."""
    if site.distance_bias is None:
        return False
    blind = device_lowering(example(site.query).device).blind
    return getattr(pattern, "estimator", None) in blind


def steps_reason(site: AttentionSite, options: Options) -> str:
    """Why nothing can be kept over denoising steps, so that it stays dense, or the empty string."""
    if not options.denoising or site.read_mask is None:
        return ""
    return f"what is kept over denoising steps needs a proven mask: {site.unproven}"


def can_be_built(expression: sympy.Expr) -> bool:
    """Whether the rewrite can build this length from the symbols that the graph's inputs hold."""
    return all(
        node.is_Integer or node.is_Symbol or node.func in FOLDS
        for node in sympy.preorder_traversal(expression)
    )


def decide_length(
    site: AttentionSite, resolved: ResolvedPatterns, options: Options
) -> AttentionPlan | Skip:
    """Compare the lengths with the least that pays: now, by a guard, or in the op."""
    num_queries, num_keys = shape_of(site.query)[2], shape_of(site.key)[2]
    least = least_lengths(site, resolved, options)
    shortest = least.keys
    trained = is_trained(site)
    # Means of what is left out have no backward, and neither has the meter.
    # Nor do ops of other kinds than these know of a bias by distance.
    plainly = not trained and site.distance_bias is None
    summaries = options.summaries if site.is_two_sided and site.softcap == 0 and plainly else 0
    selecting = options.kv_select if site.feeds_a_cache and plainly else None
    # The meter knows what a selection loses, and not what means give back.
    kept = options.denoising and site.is_two_sided and plainly
    measurable = not trained and site.kept is None
    plain = not summaries and measurable and selecting is None and not kept
    plan = AttentionPlan(
        *(site, resolved.patterns, options.dense_above, 0, resolved.source, shortest),
        training=trained,
        summaries=summaries,
        measured=meter_number(site) if options.measure and plain else 0,
        kv_select=selecting,
        causal_only=site.read_mask is not None
        and any(name in resolved.source for name in (BUILTIN, PROMISED)),
        most_lost=promised_share(resolved.patterns, options.max_loss) if plain else 1.0,
        denoising=kept,
        int8=options.attention == "int8" and not exact_reason(site, trained, summaries, kept),
    )
    long_enough = at_least(num_keys, shortest)
    if long_enough is False:
        reason = f"{length_in_words(num_keys)} keys, sparse from {shortest} on"
        return Skip(site, reason, resolved.source)
    needed = queries_needed(num_queries, num_keys, least)
    if needed:
        reason = f"{length_in_words(num_queries)} queries, sparse from {needed} on"
        return Skip(site, reason, resolved.source)
    grid = grid_of(site, resolved.grid, resolved.grid_source, kept)
    plan = dataclasses.replace(plan, grid=grid)
    # Of a cache that is longer than what it holds, the op alone knows how many keys count.
    decided = long_enough and site.mask_tensor is None
    return plan if decided else dataclasses.replace(plan, min_seq_len=shortest)


def queries_needed(num_queries: Length, num_keys: Length, least: LeastLengths) -> int:
    """How many queries a chunk of a prompt lacks: the least that pays over its keys; 0 if none."""
    if at_least(num_queries, least.queries) is False:
        return least.queries
    whole = bool(statically_known_true(num_queries == num_keys))
    if whole or not least.area or at_least(num_queries * num_keys, least.area) is not False:
        return 0
    return -(-least.area // max(1, number_now(num_keys)))


def least_lengths(
    site: AttentionSite, resolved: ResolvedPatterns, options: Options
) -> LeastLengths:
    """From how many keys and queries on the site is sparse.

    What is configured counts; else the lowering of the device says it of this very attention,
    unless the user wants it sparse whatever that costs (`dense_above` of 1 or more).
    """
    lowering = device_lowering(example(site.query).device)
    keys = resolved.min_seq_len
    if keys is None and site.kept is not None:
        keys = KEPT_SHORTEST
    ask = lowering.least_lengths
    if keys is None and ask is not None and options.dense_above < 1.0 and site.mask is not None:
        work = layer_work(
            resolved.patterns,
            dtype=site.compute_dtype,
            head_dim=int(site.head_dim),
            value_dim=int(example(site.value).shape[-1]),
            kv_heads=int(site.num_kv_heads),
            causal=site.mask.causal,
            window=site.mask.window,
            replayed=bool(dict(options.inductor).get("triton.cudagraphs")),
        )
        return ask(work, example(site.query).device)
    keys = lowering.shortest_prompt if keys is None else keys
    return LeastLengths(keys, min(FEWEST_QUERIES, keys))


def at_least(length: Length, least: int) -> bool | None:
    """Whether a length is `least` or more, by a guard where it is not known; None if none may be.

    A guard would contradict a range that the user promised: then the op decides per call.
    """
    if statically_known_true(length >= least):
        return True
    if statically_known_true(length < least):
        return False
    return bool(length >= least) if may_guard(length) else None


def length_in_words(length: Length) -> str:
    """A length as it stands in messages: the number, or the symbol with its value now."""
    if isinstance(length, int):
        return str(length)
    hint = length.node.hint
    return f"{length} ({hint} now)" if hint is not None else str(length)
