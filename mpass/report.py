"""What became sparse and what did not, and why: one Report per compiled graph."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from mpass.config.spans import in_spans
from mpass.graph.exact_scores import exact_reason
from mpass.graph.guards import live_stack
from mpass.graph.nodes import number_now, shape_of
from mpass.lowering.meter import Loss
from mpass.plan import AttentionPlan, Skip
from mpass.story.remedies import remedy_of

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

KEPT_REPORTS = 256
"""Reports kept; regional compilation makes one per layer and length."""

READ = "read at run time"
"""How what is said of a mask begins that is read in each call, since it is not proven."""


@dataclass(frozen=True)
class SiteReport:
    """One attention of a compiled graph.

    layer, path: where it stands (-1 and "" if unknown); status: "sparse" or "dense"; reason: why it
    is dense; patterns: one per query head, empty if dense; mask: the proof, line by line;
    source: the user's line; config_source: which decorator, option or file named the patterns.
    module: the identity of the innermost module that it was traced in, 0 if that is not known.
    training: whether its sparse attention has gradients.
    measured: the number by which the meter keeps what it loses, 0 where nothing is measured.
    queries, keys: its lengths in the call that was compiled; 0 if they are not known.
    grid: the grid whose tiles are the order in which it sees its tokens, "" for their own order.
    """

    layer: int
    path: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    status: str
    reason: str
    patterns: tuple[str, ...]
    spelling: str
    mask: tuple[str, ...]
    source: str
    config_source: str = ""
    module: int = field(default=0, repr=False, compare=False)
    training: bool = False
    measured: int = field(default=0, repr=False, compare=False)
    queries: int = field(default=0, repr=False, compare=False)
    keys: int = field(default=0, repr=False, compare=False)
    grid: str = ""

    @property
    def remedy(self) -> str:
        """What a user can do about the reason; "" if it is sparse."""
        return remedy_of(self.reason) if self.reason else ""


@dataclass(frozen=True)
class Report:
    """What one compile did, or all compiles of a model (`mpass.last_report()`).

    sites: what became of each attention, in graph order.
    min_seq_len: the number of keys from which on attention is sparse.
    graphs: how many compiled graphs it is about.
    notes: what else is to be known, as graph breaks and recompile limits, one sentence each.
    losses: with `options={"measure": True}`, what each of `sites` lost on its last prompt; None for
    those that were not measured. Empty otherwise, and in the report of a single graph.
    limit: the recompile limit of Dynamo that the model reached, with its value; "" if none.
    """

    sites: tuple[SiteReport, ...]
    min_seq_len: int
    graphs: int = 1
    notes: tuple[str, ...] = ()
    losses: tuple[Loss | None, ...] = ()
    limit: str = ""

    @property
    def sparse_sites(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.status == "sparse")

    def summary(self) -> str:
        """One line: how many attention layers became sparse, by which patterns; why others did not.

        Of several reasons the most frequent is told. Printing the report shows each, with what to
        do about it.
        """
        total, sparse = len(self.sites), self.sparse_sites
        noun = "attention layer" if total == 1 else "attention layers"
        if not sparse:
            reasons = Counter(site.reason for site in self.sites)
            why = "; ".join(reason for reason, _ in reasons.most_common(3))
            found = f"0 of {total} {noun} sparse" + (f": {why}" if why else "")
            if not total:
                found = f"no attention in {self.graphs} compiled graph{'s' * (self.graphs != 1)}"
            return found + self._limit_in_words()
        names = Counter(pattern.split("(")[0] for site in sparse for pattern in site.patterns)
        used = ", ".join(name for name, _ in names.most_common())
        later = sum(any(line.startswith(READ) for line in site.mask) for site in sparse)
        return (
            f"{len(sparse)} of {total} {noun}, {used}, "
            f"prompts of {self.min_seq_len} tokens and more"
            + (f"; {later} decided at run time" if later else "")
            + ("; training" if any(site.training for site in sparse) else "")
            + self._dense_in_words()
            + self._limit_in_words()
            + losses_in_words(self.losses)
        )

    def _dense_in_words(self) -> str:
        """How many are dense beside sparse ones, and why most of them are."""
        reasons = Counter(site.reason for site in self.sites if site.status != "sparse")
        if not reasons:
            return ""
        most, count = reasons.most_common(1)[0]
        total = reasons.total()
        return f"; {total} dense{f', {count} of them' if count < total else ''}: {most}"

    def _limit_in_words(self) -> str:
        """That layers may be missing, and what to do."""
        if not self.limit:
            return ""
        name = self.limit.split()[0]
        return (
            f"; layers beyond Dynamo's {self.limit} may be dense: raise torch._dynamo.config.{name}"
        )

    def __str__(self) -> str:
        return render_report(self)

    def _repr_html_(self) -> str:
        from mpass.inspection.text_table import as_html

        return as_html(report_table(self), report_lines(self))


_reports: deque[Report] = deque(maxlen=KEPT_REPORTS)


def describe_site(decision: AttentionPlan | Skip) -> SiteReport:
    """The record of one decision."""
    site = decision.site
    sparse = isinstance(decision, AttentionPlan)
    return SiteReport(
        layer=site.layer,
        path=site.path,
        num_heads=site.num_heads,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        status="sparse" if sparse else "dense",
        reason="" if isinstance(decision, AttentionPlan) else decision.reason,
        patterns=pattern_names(decision) if isinstance(decision, AttentionPlan) else (),
        spelling=site.spelling,
        mask=site.mask.proof if site.mask else decided_later(decision),
        source=site.source,
        config_source="the model" if sparse and site.kept else decision.config_source,
        module=innermost_module(site.output),
        training=isinstance(decision, AttentionPlan) and decision.training,
        measured=decision.measured if isinstance(decision, AttentionPlan) else 0,
        queries=length_now(site.query),
        keys=length_now(site.key),
        grid=str(decision.grid or "") if isinstance(decision, AttentionPlan) else "",
    )


def length_now(node: fx.Node) -> int:
    """How many positions query or key [B, H, N, D] has in the compiled call, 0 if unknown."""
    shape = shape_of(node)
    return max(0, number_now(shape[2])) if len(shape) == 4 else 0


def pattern_names(plan: AttentionPlan) -> tuple[str, ...]:
    """What each query head does, in words; a model that chooses keys itself has no pattern."""
    kept = plan.site.kept
    if kept is not None:
        return (f"dynamic_mask({kept.keep})",) * plan.site.num_heads
    return tuple(map(str, plan.patterns))


def innermost_module(node: fx.Node) -> int:
    """The identity of the innermost module that a node was traced in; 0 if it is not known."""
    stack = list(node.meta.get("nn_module_stack") or {})
    digits = str(stack[-1]).partition("@")[0] if stack else ""
    if digits.isdecimal():
        return int(digits)
    root = live_stack(node)
    return id(root[-1].module) if root else 0


def decided_later(decision: AttentionPlan | Skip) -> tuple[str, ...]:
    """What is said of a mask that is not proven: that it is read in each call, where it is."""
    if isinstance(decision, Skip):
        return ()
    return (f"{READ}, sparse or dense by what it is: {decision.site.unproven}",)


def make_report(decisions: Sequence[AttentionPlan | Skip], min_seq_len: int) -> Report:
    """The report of one graph.

    min_seq_len: what the options say, where no attention is sparse.
    """
    lengths = [
        plan.shortest
        for plan in decisions
        if isinstance(plan, AttentionPlan) and plan.shortest is not None
    ]
    min_seq_len = min(lengths, default=min_seq_len)
    return Report(tuple(describe_site(decision) for decision in decisions), min_seq_len)


def keep_report(report: Report) -> None:
    """Keep it for `reports()`, count it and log its one line."""
    from torch._dynamo.utils import counters

    _reports.append(report)
    counters["minference"]["graphs"] += 1
    counters["minference"]["sites"] += len(report.sites)
    counters["minference"]["sparse_sites"] += len(report.sparse_sites)
    for site in report.sites:
        if site.reason:
            counters["minference"][f"dense: {site.reason}"] += 1
    if report.sites:
        log.info("%s", report.summary())


def reports() -> tuple[Report, ...]:
    """Reports of the latest compiled graphs, oldest first."""
    return tuple(_reports)


def render_report(report: Report) -> str:
    """A table of the sites, a row for those alike; below it the summary, the notes, what to do."""
    # rich is imported only when a report is printed.
    from mpass.inspection.text_table import render

    shown = render(report_table(report)) if report.sites else ""
    return shown + "\n".join(report_lines(report))


def report_table(report: Report) -> Table:
    """A row for the sites that are alike."""
    from mpass.inspection.text_table import Table, patterns_of_heads

    table = Table(title=None)
    for column in ("layer", "module", "heads", "kv", "dim", "status", "patterns or reason", "from"):
        table.add_column(column)
    for alike in runs_of_sites(report.sites):
        site = alike[0]
        table.add_row(
            in_spans(each.layer for each in alike) if site.layer >= 0 else "-",
            (site.path if len(alike) == 1 else path_of_layers(site)) or "-",
            str(site.num_heads),
            str(site.num_kv_heads),
            str(site.head_dim),
            f"{site.status}, training" if site.training else site.status,
            site.reason or ", ".join(filter(None, [patterns_of_heads(site.patterns), site.grid])),
            site.config_source or "-",
        )
    return table


def report_lines(report: Report) -> list[str]:
    """The summary, the notes, and what to do about each reason."""
    lines = [report.summary(), *worst_losses(report), *report.notes]
    for reason in dict.fromkeys(site.reason for site in report.sites if site.reason):
        lines.append(f"{reason}: {remedy_of(reason)}")
    return lines


def int8_notes(decisions: Sequence[AttentionPlan | Skip]) -> tuple[str, ...]:
    """How many sparse attentions have scores in 8 bits, and why others have not, as a sentence."""
    plans = [decision for decision in decisions if isinstance(decision, AttentionPlan)]
    if not plans:
        return ()
    kept = Counter(
        exact_reason(plan.site, plan.training, plan.summaries, plan.denoising)
        for plan in plans
        if not plan.int8
    )
    why = "; ".join(f"{count} not: {reason}" for reason, count in kept.most_common())
    done = f"{len(plans) - kept.total()} of {len(plans)} sparse attentions with scores in 8 bits"
    return (done + (f" ({why})" if why else ""),)


def losses_in_words(losses: Sequence[Loss | None]) -> str:
    """What all attentions together lost on the last prompt, for the end of a line; "" if unknown.

    Means over heads and layers, the layers that ran dense with what they lose: nothing.
    """
    known = [loss for loss in losses if loss is not None]
    if not known:
        return ""
    lost = sum(sum(loss.lost) / len(loss.lost) for loss in known if loss.lost) / len(known)
    error = sum(sum(loss.error) / len(loss.error) for loss in known if loss.error) / len(known)
    dense = sum(not loss.lost for loss in known)
    return f"; the last prompt lost {lost:.2%} of the attention, outputs are off by {error:.1%}" + (
        f", {dense} of {len(known)} layers ran dense" if dense else ""
    )


def worst_losses(report: Report, count: int = 3) -> list[str]:
    """The heads that lost most on the last prompt, one line for all; empty if none is known."""
    heads = [
        (lost, error, site.layer, head)
        for site, loss in zip(report.sites, report.losses, strict=False)
        if loss is not None
        for head, (lost, error) in enumerate(zip(loss.lost, loss.error, strict=True))
    ]
    if not heads:
        return []
    worst = ", ".join(
        f"layer {layer} head {head} {lost:.1%} (output off by {error:.0%})"
        for lost, error, layer, head in sorted(heads, reverse=True)[:count]
    )
    rows = max(loss.rows for loss in report.losses if loss is not None)
    return [f"measured on {rows} rows of each layer; heads that lost most: {worst}"]


def runs_of_sites(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Sites that differ in nothing but rising layers, together; in the order of the first ones."""
    runs: dict[tuple[object, ...], list[SiteReport]] = {}
    for number, site in enumerate(sites):
        alike = (
            *(path_of_layers(site), site.num_heads, site.num_kv_heads, site.head_dim),
            *(site.status, site.reason, site.patterns, site.config_source, site.grid),
        )
        if site.layer < 0 or (alike in runs and runs[alike][-1].layer >= site.layer):
            runs[(*alike, number)] = [site]
        else:
            runs.setdefault(alike, []).append(site)
    return list(runs.values())


def path_of_layers(site: SiteReport) -> str:
    """The module's path with a star for the layer: `model.layers.*.self_attn`."""
    parts = site.path.split(".")
    return ".".join("*" if part == str(site.layer) else part for part in parts)
