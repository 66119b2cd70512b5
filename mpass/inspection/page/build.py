"""Build the page from data: everything inlined, nothing fetched.

The drawing library is D3 (see vendor/); pictures are drawn by the browser from the data below.
"""

from __future__ import annotations

import dataclasses
import html
import json
import statistics
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import jinja2

from mpass.config.pattern_text import short_form
from mpass.graph.printing import op_changes
from mpass.inspection.kernels import kernel_details
from mpass.inspection.outline import Outline
from mpass.inspection.page.pack import (
    kept_queries,
    map_step,
    pack_looks,
    pack_maps,
    pack_tokens,
    shrink,
)
from mpass.inspection.results import (
    ExplanationFields,
    GraphExplanation,
    LayerProfile,
    ProfileFields,
    SiteCost,
)
from mpass.inspection.tables import readable_bytes, span
from mpass.inspection.text_table import patterns_of_heads
from mpass.lowering.kernel_sources import KernelSource
from mpass.report import SiteReport

SCRIPTS = (
    *("base.js", "state.js", "maps.js", "heads.js", "looks.js", "pins.js", "export.js"),
    *("graph.js", "tables.js", "compare.js", "start.js"),
)
"""In the order in which they are run."""


def build_page(
    explanation: ExplanationFields,
    profile: ProfileFields | None = None,
    *,
    beside: ProfileFields | None = None,
) -> str:
    """The page of an explanation, with the maps and times of a profile if there is one.

    beside: another profile, of other options or another prompt, to compare the first with.
    """
    folder = files("mpass.inspection.page")
    jinja_env = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    template = jinja_env.from_string((folder / "page.html.jinja").read_text("utf-8"))
    payload = json.dumps(payload_of(explanation, profile, beside), separators=(",", ":"))
    return template.render(
        title=html.escape(f"{title_of(explanation)} through mpass"),
        style=(folder / "style.css").read_text("utf-8"),
        highlight_style=highlight_style(),
        library=(folder / "vendor" / "d3.min.js").read_text("utf-8"),
        scripts=[(folder / "js" / name).read_text("utf-8") for name in SCRIPTS],
        # "</script>" inside of a string would end the element.
        data=payload.replace("<", "\\u003c"),
    )


def title_of(explanation: ExplanationFields) -> str:
    """The model by the name that it was given."""
    return dict(explanation.provenance).get("model", explanation.model)


def payload_of(
    explanation: ExplanationFields,
    profile: ProfileFields | None = None,
    beside: ProfileFields | None = None,
) -> dict[str, Any]:
    """What the page's scripts read: one run, or two beside each other."""
    profiles = [each for each in (profile, beside) if each is not None]
    step, chosen = map_step(profiles), kept_queries(profiles)
    runs = [page_data(explanation, profile, step=step, chosen=chosen)]
    if beside is not None:
        runs.append(page_data(beside.explanation, beside, step=step, chosen=chosen))
    kernels = {kernel.name: kernel for each in profiles for kernel in each.kernels}
    return {"runs": runs, "kernels": [kernel_data(kernel) for kernel in kernels.values()]}


def page_data(
    explanation: ExplanationFields,
    profile: ProfileFields | None = None,
    *,
    step: int = 1,
    chosen: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One run. step: as of `map_step`; chosen: as of `kept_queries`, None for all queries."""
    rows = head_rows(explanation, profile, step, chosen)
    names = {head["pattern"].split("(")[0] for row in rows for head in row["heads"]}
    return {
        "name": run_name(explanation),
        "provenance": explanation.provenance,
        "tiles": tiles(explanation, profile),
        "summary": summary(explanation),
        "patterns": sorted(names - {""}),
        "profiled": profile is not None and bool(profile.layers),
        "tokens": pack_tokens(profile.tokens) if profile and profile.tokens else "",
        "rows": rows,
        "graphs": [graph_data(graph) for graph in explanation.graphs if graph.sites],
        "breaks": [dataclasses.asdict(item) for item in explanation.breaks],
        "seconds": profile.seconds if profile else {},
    }


def run_name(explanation: ExplanationFields) -> str:
    """A run in a word or two, to tell it from the one beside it."""
    known = dict(explanation.provenance)
    return ", ".join(known[name] for name in ("prompt", "options") if name in known)


def tiles(explanation: ExplanationFields, profile: ProfileFields | None) -> list[tuple[str, str]]:
    """What the page says first: figures, and what they are of. Plans are told from what ran."""
    sites = explanation.sites
    sparse = sum(site.status == "sparse" for site in sites)
    graphs = len(explanation.graphs)
    planned = f"attentions planned sparse in {graphs} graph{'s' * (graphs != 1)}"
    shown = [(f"{sparse} of {len(sites)}", planned)]
    ran_sparse, ran_dense = explanation.ran
    if ran_sparse + ran_dense:
        shown.append((f"{ran_sparse} of {ran_sparse + ran_dense}", "of these ran sparse"))
    layers = profile.layers if profile else ()
    if layers:
        shown += [
            (f"{layers[0].num_keys:,}", "keys"),
            (mean(layer.ran.density for layer in layers), "density that ran, mean over heads"),
            (mean(layer.ran.recall for layer in layers), "recall of what ran, mean over heads"),
        ]
    if any(layer.ran != layer.planned for layer in layers):
        shown += [
            (mean(layer.planned.density for layer in layers), "density as planned"),
            (mean(layer.planned.recall for layer in layers), "recall as planned"),
        ]
    if profile and (total := sum(profile.seconds.values())):
        ours = profile.seconds["index"] + profile.seconds["attention"]
        shown.append((f"{ours / total:.0%}", "of time in sparse attention"))
        dense = profile.seconds["dense attention"]
        shown.append((f"{dense / total:.0%}", "of time in dense attention"))
    alone = sum(layer.dense_seconds for layer in layers)
    if profile and alone and not any(layer.dense_reason for layer in layers):
        ours = profile.seconds["index"] + profile.seconds["attention"]
        if ours:
            shown.append((f"{alone / ours:.2f}x", "attention, dense time over sparse time"))
    errors = [layer.output_error for layer in layers if layer.output_error is not None]
    if errors:
        shown.append((mean(errors), "output error as planned, mean over heads"))
    if explanation.index_bytes:
        shown.append((readable_bytes(explanation.index_bytes), "index of one layer"))
    if explanation.mask_bytes:
        shown.append((readable_bytes(explanation.mask_bytes), "mask no longer made"))
    return shown


def mean(shares: Iterable[float]) -> str:
    """The mean of shares as `58.8%`."""
    return f"{statistics.fmean(shares):.1%}"


def summary(explanation: ExplanationFields) -> str:
    """From which length on attention is sparse, and the most frequent reasons why not."""
    text = f"Prompts of {explanation.min_seq_len} tokens and more are sparse. "
    for reason, count in explanation.reasons.most_common(3):
        text += f"Dense, {count} x: {reason}. "
    return text


def head_rows(
    explanation: ExplanationFields,
    profile: ProfileFields | None,
    step: int = 1,
    chosen: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """A row of the layer x head map per attention, measured or not."""
    measured = {layer.layer: layer for layer in profile.layers} if profile else {}
    rows = []
    for graph in explanation.graphs:
        for site, cost in zip(graph.sites, graph.costs, strict=True):
            layer = measured.pop(site.layer, None) if site.status == "sparse" else None
            rows.append(head_row(site, cost, layer, step, chosen))
    return rows


def head_row(
    site: SiteReport,
    cost: SiteCost,
    layer: LayerProfile | None,
    step: int = 1,
    chosen: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One attention of the map; heads without a measurement have nulls."""
    heads: list[dict[str, Any]] = [
        {
            "pattern": site.patterns[head] if site.patterns else "",
            "shown": short_form(site.patterns[head]) if site.patterns else "",
            "density": cost.density[head] if head < len(cost.density) else None,
            "predicted": cost.predicted[head] if head < len(cost.predicted) else None,
            "recall": None,
            "lost": None,
            "error": None,
            "worst": [0, 0, 0],
            "advice": "",
        }
        for head in range(site.num_heads)
    ]
    row: dict[str, Any] = {
        "layer": site.layer,
        "status": site.status,
        "label": str(site.layer) if site.layer >= 0 else site.path or "-",
        "path": site.path,
        "reason": site.reason,
        "source": site.source,
        "measured": layer is not None,
        "lowering": cost.lowering,
        "ran_because": cost.reason,
        "heads": heads,
    }
    if layer is None:
        return row
    for values, head in zip(heads, layer.heads, strict=True):
        values |= {
            "density": round(head.density, 6),
            "recall": round(head.recall, 6),
            "lost": round(head.lost_mass, 6),
            "ran_error": round(head.error, 6),
            "error": None if head.output_error is None else round(head.output_error, 6),
            "worst": [head.worst[0], head.worst[1], round(head.worst[2], 4)],
            "advice": head.advice,
        }
    computed, exact = shrink(layer.computed, layer.exact, step)
    looks = layer.looks
    if looks is not None and chosen is None:
        chosen = range(len(looks.queries))
    return row | {
        "looks": None if looks is None else pack_looks(looks, chosen or ()),
        "planned": dataclasses.asdict(layer.planned),
        "ran": dataclasses.asdict(layer.ran),
        "error": layer.output_error,
        "dense_seconds": layer.dense_seconds,
        "lowering": layer.lowering,
        "num_queries": layer.num_queries,
        "num_keys": layer.num_keys,
        "index_bytes": layer.index_bytes,
        "index_seconds": layer.index_seconds,
        "attention_seconds": layer.attention_seconds,
        "all_queries": layer.all_queries,
        "looked": len(layer.query_blocks),
        "side": computed.shape[-1],
        "maps": pack_maps(computed, exact),
    }


def graph_data(graph: GraphExplanation) -> dict[str, Any]:
    """A graph's outlines, its sites in words, its calls that changed, its pass times."""
    sites = []
    for site, details, cost in zip(graph.sites, graph.details, graph.costs, strict=True):
        shown = {
            name: details[name] for name in ("query", "key", "value", "scale", "mask", "proof")
        }
        sites.append(
            dataclasses.asdict(site)
            | shown
            | {
                "patterns": patterns_of_heads(site.patterns),
                "origin": details["patterns from"],
                "predicted": span(cost.predicted),
                "density": span(cost.density),
                "ran": f"dense: {cost.reason}" if cost.reason else cost.lowering,
            }
        )
    return {
        "before": outline_data(graph.outline_before),
        "after": outline_data(graph.outline_after),
        "sites": sites,
        "ops": op_changes(graph.ops_before, graph.ops_after),
        "seconds": graph.seconds,
    }


def outline_data(outline: Outline) -> dict[str, Any]:
    """An outline as lists."""
    return {
        "boxes": [
            {"kind": box.kind, "label": box.label, "layer": box.layer, "text": box.text()}
            for box in outline.boxes
        ],
        "edges": outline.edges,
    }


def kernel_data(kernel: KernelSource) -> dict[str, Any]:
    """A kernel's source as highlighted HTML."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name

    code = highlight(kernel.source, get_lexer_by_name(kernel.language), HtmlFormatter())
    return {"name": kernel.name, "html": code, "details": kernel_details(kernel)}


def highlight_style() -> str:
    """Pygments' colors for both themes."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="monokai").get_style_defs('[data-theme="dark"] .highlight')
    clear = ".highlight, [data-theme] .highlight { background: none; }"
    return f"{light}\n{dark}\n{clear}"
