"""The report of a model from those of its graphs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from mpass.graph.nodes import layer_index
from mpass.lowering.meter import loss_of
from mpass.options import Options
from mpass.plan import ONE_QUERY
from mpass.report import Report, SiteReport
from mpass.story.graphs import CompiledGraph, graphs_of_last_model
from mpass.story.limits import limits_reached

SHOWN = 3
"""Reasons of one kind that are told; the log has all of them."""

NOTHING_COMPILED = (
    'nothing was compiled by backend="minference" in this process: a model compiles when it first '
    'runs. torch.compile(model, backend="minference").generate() never does, because generate '
    "belongs to the module inside the wrapper and calls that one: use "
    'model.compile(backend="minference"), which works in place. A module of torch.nn itself, as '
    "nn.TransformerEncoder, is compiled only as a part of a module of yours"
)

OVER_THE_LIMIT = (
    "layers that such a function calls may have run without the compiler, dense: raise "
    "torch._dynamo.config.recompile_limit and accumulated_recompile_limit above the number of "
    "layers before the first call"
)

Key = tuple[int, int, str, str, int]


def last_report() -> Report:
    """The report of the model that was compiled last in this process; without one, a note on why.

    Each attention has one row: sparse if it is sparse in any graph of the model, else with the
    reason of its longest prompt rather than that of its decoding step. The notes tell what else
    there is: graphs where it is dense, graph breaks, recompile limits, layers never compiled.
    With `options={"measure": True}` it tells what the last prompt lost; a GPU is waited for then.
    `mpass.reports()` has the report of each graph.
    """
    graphs = graphs_of_last_model()
    if not graphs:
        return Report((), 0, notes=(NOTHING_COMPILED,))
    sites = merge_sites([graph.report for graph in graphs])
    rows = (*named_by_model(sites, graphs), *never_compiled(sites, graphs))
    notes = (
        *notes_of_graphs([graph.report for graph in graphs]),
        *decoding_notes(sites, [graph.report for graph in graphs]),
        *dense_elsewhere(sites, [graph.report for graph in graphs]),
        *limit_notes(graphs),
        *break_notes(graphs),
        *shared_notes(rows, graphs),
        *unused_layers(rows, graphs[-1].options),
    )
    lengths = [graph.report.min_seq_len for graph in graphs if graph.report.sites]
    least = lengths[0] if lengths else graphs[-1].report.min_seq_len
    ordered = in_order(rows)
    losses = tuple(loss_of(site.measured) if site.measured else None for site in ordered)
    measured = losses if any(loss is not None for loss in losses) else ()
    limits = limits_reached(owner_of(graphs), graphs[0].number)
    limit = f"{limits[0].name} ({limits[0].value})" if limits else ""
    return Report(ordered, least, len(graphs), notes, measured, limit)


def keyed(report: Report) -> dict[Key, SiteReport]:
    """The sites of a graph by what is the same in all graphs of a model."""
    counts: Counter[tuple[object, ...]] = Counter()
    found: dict[Key, SiteReport] = {}
    for site in report.sites:
        place = (site.module, site.layer, site.path, site.source)
        found[*place, counts[place]] = site
        counts[place] += 1
    return found


def rank(site: SiteReport) -> int:
    """Which outcome tells more of an attention: sparse, then a reason, then one query."""
    if site.status == "sparse":
        return 2
    return 0 if site.reason == ONE_QUERY else 1


def merge_sites(reports: Iterable[Report]) -> tuple[SiteReport, ...]:
    """One row for each attention of a model: of equal outcomes, the first."""
    best: dict[Key, SiteReport] = {}
    for report in reports:
        for key, site in keyed(report).items():
            if key not in best or rank(site) > rank(best[key]):
                best[key] = site
    return tuple(best.values())


def notes_of_graphs(reports: Sequence[Report]) -> list[str]:
    """What graphs say of their linear layers, each once; of decoding only where nothing else."""
    notes = list(dict.fromkeys(note for report in reports for note in report.notes))
    return [note for note in notes if not note.startswith("0 of ")] or notes[:1]


def decoding_notes(sites: Sequence[SiteReport], reports: Sequence[Report]) -> list[str]:
    """What there is to say of decoding."""
    if sites and all(site.reason == ONE_QUERY for site in sites):
        return [
            "only attention of one query was compiled, so that nothing can become sparse: "
            "generate() with compile_config compiles its decoding steps alone. Compile the "
            "prefill: "
            'model.compile(backend="minference")'
        ]
    decoding = [r for r in reports if r.sites and all(s.reason == ONE_QUERY for s in r.sites)]
    if not decoding:
        return []
    graphs = "graph has" if len(decoding) == 1 else "graphs have"
    words = "one query only (decoding, pooling): nothing to skip, dense is right"
    return [f"{len(decoding)} {graphs} {words}"]


def dense_elsewhere(sites: Sequence[SiteReport], reports: Sequence[Report]) -> list[str]:
    """Reasons of attentions that are sparse in one graph and dense in another."""
    shown = {id(site) for site in sites}
    found: Counter[str] = Counter()
    for report in reports:
        reasons = {s.reason for s in report.sites if id(s) not in shown and rank(s) == 1}
        found.update(reasons)
    return [
        f"dense in {count} other graph{'s' * (count > 1)} of the model: {reason}"
        for reason, count in found.most_common(SHOWN)
    ]


def break_notes(graphs: Sequence[CompiledGraph]) -> list[str]:
    """What broke the model into graphs."""
    broken = Counter(graph.broken for graph in graphs if graph.broken)
    notes = [f"graph break: {reason}" for reason, _ in broken.most_common(SHOWN)]
    if len(broken) > SHOWN:
        notes.append(f"and {len(broken) - SHOWN} other graph breaks")
    if notes:
        notes[-1] += '. What stands between graphs is not compiled; TORCH_LOGS="graph_breaks" '
        notes[-1] += "shows every place"
    return notes


def shared_notes(sites: Sequence[SiteReport], graphs: Sequence[CompiledGraph]) -> list[str]:
    """How many modules like those that have attention have no row of their own.

    Between graph breaks, and where layers are compiled one by one, Dynamo takes one graph for all
    modules that it fits; the module that it was made for has the row.
    """
    owner = owner_of(graphs)
    shown = {site.module for site in sites}
    if not isinstance(owner, nn.Module):
        return []
    named = [(name, module) for name, module in owner.named_modules() if id(module) in shown]
    limits = limits_reached(owner, graphs[0].number)
    uncompiled = ", or without the compiler" if limits else ""
    notes = []
    for kind in dict.fromkeys(type(module) for _, module in named):
        count = sum(type(m) is kind and id(m) not in shown for m in owner.modules())
        if count:
            first = next(name for name, module in named if type(module) is kind)
            others = f"{count} other module{'s' * (count > 1)}"
            notes.append(
                f"{others} of type {kind.__name__} had no graph of their own: those that ran did "
                f"so by a graph of this table, such as that of {first or 'the model'}{uncompiled}"
            )
    return notes


def unused_layers(sites: Sequence[SiteReport], options: object) -> list[str]:
    """That options name layers beyond the last attention: they change nothing."""
    last = max((site.layer for site in sites), default=-1)
    if not isinstance(options, Options) or any(site.layer < 0 for site in sites) or not sites:
        return []
    unused = [str(span) for span, _ in options.sparse_config.layers if span.first > last]
    if not unused:
        return []
    noun = "layer" if len(unused) == 1 else "layers"
    return [
        f"{options.config_source or 'options'} names {noun} {', '.join(unused)}, and the last "
        f"attention that was compiled is of layer {last}: what it says of them has no effect"
    ]


def owner_of(graphs: Sequence[CompiledGraph]) -> object:
    """The model or function of graphs; None if it is not known."""
    owner = graphs[-1].owner
    return None if owner is None else owner()


def named_by_model(
    sites: Sequence[SiteReport], graphs: Sequence[CompiledGraph]
) -> list[SiteReport]:
    """The sites with their place in the whole model, where a graph knows only a part of it."""
    owner = owner_of(graphs)
    if not isinstance(owner, nn.Module):
        return list(sites)
    names = {id(module): name for name, module in owner.named_modules()}
    found = []
    for site in sites:
        path = names.get(site.module, "") or site.path
        layer = layer_index(path) if site.layer < 0 else site.layer
        found.append(dataclasses.replace(site, path=path, layer=layer))
    return found


def in_order(sites: Sequence[SiteReport]) -> tuple[SiteReport, ...]:
    """Sites of layers by their number if all have one, else as they are."""
    paths = {site.path.partition(".")[0] for site in sites}
    if len(paths) > 1 or any(site.layer < 0 for site in sites):
        return tuple(sites)
    return tuple(sorted(sites, key=lambda site: site.layer))


def never_compiled(
    sites: Sequence[SiteReport], graphs: Sequence[CompiledGraph]
) -> list[SiteReport]:
    """Rows for modules like those that have attention, where a limit kept them out of all graphs.

    Without a limit on the code that attention is compiled in, a module that is in no graph may be
    served by the graph of another.
    """
    owner = owner_of(graphs)
    frames = {graph.frame[:2] for graph in graphs if graph.frame and graph.report.sites}
    limits = [
        limit
        for limit in limits_reached(owner, graphs[0].number)
        if any(limit.function.startswith(f"'{name}' ({file}:") for file, name in frames)
    ]
    if not limits or not isinstance(owner, nn.Module):
        return []
    reason = f"never compiled: Dynamo's {limits[-1].name} ({limits[-1].value}) was reached"
    kinds = {type(m): site for m in owner.modules() for site in sites if site.module == id(m)}
    compiled = {site.module for site in sites}
    return [
        dataclasses.replace(
            kinds[type(module)],
            layer=layer_index(name),
            path=name,
            status="dense",
            reason=reason,
            patterns=(),
            mask=(),
            config_source="",
            module=id(module),
        )
        for name, module in owner.named_modules()
        if type(module) in kinds and id(module) not in compiled
    ]


def limit_notes(graphs: Sequence[CompiledGraph]) -> list[str]:
    """Which functions were compiled too often, and what to do.

    What is over the limit runs without the compiler, and so does what it calls, unless a graph that
    is there fits: which layers these are is not known.
    """
    limits = limits_reached(owner_of(graphs), graphs[0].number)
    notes = [
        f"Dynamo's {limit.name} ({limit.value}) was reached by {limit.function}: {limit.why}"
        for limit in limits[:SHOWN]
    ]
    return [*notes, OVER_THE_LIMIT] if notes else []
