"""Explanations and profiles as text tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mpass.inspection.results import ExplanationFields, ProfileFields, SiteCost
from mpass.inspection.text_table import count_patterns, render
from mpass.report import SiteReport


def render_explanation(explanation: ExplanationFields) -> str:
    """A row per attention; below, the graphs, the breaks and the memory."""
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
    sites = explanation.sites
    sparse = sum(site.status == "sparse" for site in sites)
    lines = [
        f"{explanation.model}: {sparse} of {len(sites)} attentions sparse in "
        f"{len(explanation.graphs)} graphs, from {explanation.min_seq_len} tokens on",
    ]
    lines += [f"dense, {count} x: {reason}" for reason, count in explanation.reasons.most_common()]
    lines += [f"graph break: {b.reason.splitlines()[0]} ({b.source})" for b in explanation.breaks]
    if explanation.index_bytes or explanation.mask_bytes:
        lines.append(
            f"memory: index {readable_bytes(explanation.index_bytes)} per layer; "
            f"masks no longer made: {readable_bytes(explanation.mask_bytes)}"
        )
    return render(table) + "\n".join(lines)


def words_of(site: SiteReport, cost: SiteCost) -> str:
    """Why an attention is dense and where; else its patterns, and why they did not run."""
    if site.reason:
        return f"{site.reason}\n{site.source}"
    patterns = count_patterns(site.patterns)
    return f"{patterns}\nran dense: {cost.reason}" if cost.reason else patterns


def render_profile(profile: ProfileFields) -> str:
    """A row per layer; below, the heads that lost most and what to do about them."""
    table = Table()
    for column in ("layer", "ran", "density", "recall", "worst head", "index ms", "attention ms"):
        table.add_column(column)
    for layer in profile.layers:
        worst = min(range(len(layer.heads)), key=lambda h: layer.heads[h].recall, default=None)
        table.add_row(
            str(layer.layer) if layer.layer >= 0 else layer.path or "-",
            layer.lowering,
            span([head.density for head in layer.heads]),
            span([head.recall for head in layer.heads]),
            "-"
            if worst is None
            else f"{worst}: {layer.heads[worst].recall:.1%} {layer.heads[worst].pattern}",
            f"{layer.index_seconds * 1e3:.1f}",
            f"{layer.attention_seconds * 1e3:.1f}",
        )
    times = profile.seconds
    lines = [", ".join(f"{name}: {value:.2f} s" for name, value in times.items())]
    lines += [
        f"layer {layer.layer} head {head.head}: {head.advice}"
        for layer, head in profile.worst_heads(8)
        if head.advice
    ]
    return render(table) + "\n".join(lines)


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
