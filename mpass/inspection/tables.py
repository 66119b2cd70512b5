"""Explanations and profiles as text tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table

from mpass.config.pattern_text import short_form
from mpass.config.spans import in_spans
from mpass.inspection.results import ExplanationFields, LayerProfile, ProfileFields, SiteCost
from mpass.inspection.text_table import patterns_of_heads, render
from mpass.report import SiteReport

PROFILE_WIDTH = 136
"""Columns of a profile's table: what was planned stands beside what ran."""


def render_explanation(explanation: ExplanationFields) -> str:
    """A row per attention; below, the graphs, the breaks and the memory."""
    return render(explanation_table(explanation)) + "\n".join(explanation_lines(explanation))


def explanation_table(explanation: ExplanationFields) -> Table:
    """A row per attention."""
    table = Table()
    columns = (
        "graph",
        "layer",
        "status",
        "keys",
        "ran",
        "density",
        "cost, at most",
        "patterns or reason",
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for number, graph in enumerate(explanation.graphs):
        for site, cost in zip(graph.sites, graph.costs, strict=True):
            table.add_row(
                str(number),
                str(site.layer) if site.layer >= 0 else site.path or "-",
                site.status,
                str(cost.num_keys),
                cost.lowering or "-",
                span(cost.density),
                span(cost.predicted),
                words_of(site, cost),
            )
    return table


def explanation_lines(explanation: ExplanationFields) -> list[str]:
    """What stands below the table."""
    sites = explanation.sites
    sparse = sum(site.status == "sparse" for site in sites)
    graphs = len(explanation.graphs)
    lines = [
        f"{explanation.model}: {sparse} of {len(sites)} attentions planned sparse in {graphs} "
        f"graph{'s' * (graphs != 1)}, from {explanation.min_seq_len} tokens on",
        *ran_in_words(explanation),
    ]
    lines += [f"dense, {count} x: {reason}" for reason, count in explanation.reasons.most_common()]
    lines += [f"graph break: {b.reason.splitlines()[0]} ({b.source})" for b in explanation.breaks]
    if explanation.index_bytes or explanation.mask_bytes:
        lines.append(
            f"memory: index {readable_bytes(explanation.index_bytes)} per layer; "
            f"masks no longer made: {readable_bytes(explanation.mask_bytes)}"
        )
    return lines


def ran_in_words(explanation: ExplanationFields) -> list[str]:
    """How many of those that were planned sparse ran so on this prompt, in a line if any ran."""
    sparse, dense = explanation.ran
    if not sparse + dense:
        return []
    return [f"of these, {sparse} ran sparse on this prompt and {dense} dense"]


def words_of(site: SiteReport, cost: SiteCost) -> str:
    """Why an attention is dense and where; else its patterns, and why they did not run."""
    if site.reason:
        return f"{site.reason}\n{site.source}"
    patterns = patterns_of_heads(site.patterns)
    return f"{patterns}\nran dense: {cost.reason}" if cost.reason else patterns


def render_profile(profile: ProfileFields) -> str:
    """A row per layer; below, what ran dense, and what to do about the heads that lost most."""
    return render(profile_table(profile), PROFILE_WIDTH) + "\n".join(profile_lines(profile))


def profile_table(profile: ProfileFields) -> Table:
    """A row per layer."""
    table = Table()
    columns = ("layer", "ran", "density", "recall", "error", "worst head")
    for column in (*columns, "ms: index + attention", "dense ms"):
        table.add_column(column)
    for layer in profile.layers:
        density = span([head.density for head in layer.heads])
        recall = span([head.recall for head in layer.heads])
        table.add_row(
            layer_name(layer),
            layer.lowering,
            f"100.0%{plan(density)}" if layer.dense_reason else density,
            f"100.0%{plan(recall)}" if layer.dense_reason else recall,
            error_in_words(layer),
            worst_head(layer),
            f"{layer.index_seconds * 1e3:.1f} + {layer.attention_seconds * 1e3:.1f}",
            f"{layer.dense_seconds * 1e3:.1f}" if layer.dense_seconds else "-",
        )
    return table


def profile_lines(profile: ProfileFields) -> list[str]:
    """What stands below the table."""
    sites = profile.explanation.sites
    planned, dense = len(profile.layers), len(profile.dense_layers)
    lines = [
        f"{planned} of {len(sites)} attentions planned sparse: {planned - dense} ran sparse on "
        f"this prompt, {dense} dense",
        *dense_in_words(profile.dense_layers),
        *errors_in_words(profile.layers),
        ", ".join(f"{name}: {value:.2f} s" for name, value in profile.seconds.items()),
    ]
    lines += [
        f"layer {layer.layer} head {head.head}: {head.advice}"
        for layer, head in profile.worst_heads(8)
        if head.advice
    ]
    return lines


def error_in_words(layer: LayerProfile) -> str:
    """How far outputs are from exact ones, mean over heads; none where dense attention ran."""
    if layer.output_error is None:
        return "-"
    return "0.0%" if layer.dense_reason else f"{layer.output_error:.1%}"


def errors_in_words(layers: Sequence[LayerProfile]) -> list[str]:
    """How far outputs are off, as the meter measured it, in a line if any are."""
    heads = [(head.error, layer, head.head) for layer in layers for head in layer.heads]
    worst = max(heads, key=lambda each: each[0], default=None)
    if worst is None or worst[0] == 0.0:
        return []
    mean = sum(error for error, _, _ in heads) / len(heads)
    return [
        f"outputs are off by {mean:.1%} of their size, mean over heads; most: "
        f"layer {layer_name(worst[1])} head {worst[2]} by {worst[0]:.1%}"
    ]


def layer_name(layer: LayerProfile) -> str:
    """Its number, else its place."""
    return str(layer.layer) if layer.layer >= 0 else layer.path or "-"


def plan(shares: str) -> str:
    """What was planned where dense attention ran; nothing where no plan was made beforehand."""
    return "" if shares == "100.0%" else f", planned {shares}"


def worst_head(layer: LayerProfile) -> str:
    """The head that lost most, and its pattern; a layer that ran dense lost nothing."""
    if layer.dense_reason or not layer.heads:
        return "-"
    head = min(layer.heads, key=lambda each: each.recall)
    return f"{head.head}: {head.recall:.1%} {short_form(head.pattern)}"


def dense_in_words(layers: Sequence[LayerProfile]) -> list[str]:
    """`ran dense, layers 0-3, 7: why`; a line for all whose reasons differ in numbers only."""
    kinds: dict[str, list[LayerProfile]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"[0-9.]+", "#", layer.dense_reason), []).append(layer)
    lines = []
    for alike in kinds.values():
        numbers = [layer.layer for layer in alike]
        if min(numbers) < 0:
            names = ", ".join(map(layer_name, alike))
        else:
            names = in_spans(sorted(set(numbers)))
        reasons = {layer.dense_reason for layer in alike}
        more = " (the first; numbers differ)" if len(reasons) > 1 else ""
        noun = "layer" if len(alike) == 1 else "layers"
        lines.append(f"ran dense, {noun} {names}: {alike[0].dense_reason}{more}")
    return lines


def span(values: Sequence[float]) -> str:
    """`12.0%`, or `3.1% to 40.2%`, of shares."""
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:.1%}" if f"{low:.1%}" == f"{high:.1%}" else f"{low:.1%} to {high:.1%}"


def readable_bytes(count: float) -> str:
    """`1.5 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
