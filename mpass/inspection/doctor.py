"""What to change so that a model's attention becomes sparse, or faster: `mpass doctor MODEL`.

An explanation says what became of each attention; a diagnosis groups that by cause, adds what is
wrong with the machine, and says what to do, the causes of most attentions first.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mpass.config.spans import in_spans
from mpass.files import cache_dir
from mpass.inspection.results import ExplanationFields, SiteCost
from mpass.inspection.text_table import as_html
from mpass.report import SiteReport
from mpass.story.remedies import NOTHING, remedy_of

RAN_DENSE: tuple[tuple[str, str], ...] = (
    (r"keys, sparse from", "lower min_seq_len if it pays on your machine"),
    (
        r"does not pay here",
        "take a longer prompt, or a pattern that estimates less, as a_shape; dense is faster here",
    ),
    (
        r"dense above|of the work",
        "take a longer prompt, or a pattern with a smaller budget; raise dense_above only to look",
    ),
    (r"mask", "build the mask inside the compiled model, or pass a padding mask [B, N]"),
)
"""Regular expressions of why an op ran dense, and what to do; the first that is found decides."""


@dataclass(frozen=True)
class Finding:
    """One cause, of all attentions that share it.

    kind: "right" for what is well, "change" where something can be done, "fixed" where nothing can.
    what: the cause in words. where: layers or modules. source: the first line of the user's model
    that it is about, "" for none. remedy: what to do. count: attentions concerned, 0 for a finding
    about the machine.
    """

    kind: str
    what: str
    where: str
    source: str
    remedy: str
    count: int


@dataclass(frozen=True)
class Diagnosis:
    """All findings on a model: `print` it, or read its fields."""

    model: str
    attentions: int
    sparse: int
    findings: tuple[Finding, ...]

    @property
    def changes(self) -> tuple[Finding, ...]:
        """What can be done something about."""
        return tuple(finding for finding in self.findings if finding.kind == "change")

    def as_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return dataclasses.asdict(self)

    def _repr_html_(self) -> str:
        return as_html(None, str(self).splitlines())

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.sparse} of {self.attentions} attentions ran sparse here"]
        for finding in self.findings:
            place = f" ({finding.where})" if finding.where else ""
            many = f"{finding.count} x " if finding.count else ""
            lines.append(f"{MARKS[finding.kind]} {many}{finding.what}{place}")
            if finding.source and finding.kind != "right":
                lines.append(f"    at {finding.source}")
            if finding.remedy:
                lines.append(f"    -> {finding.remedy}")
        if not self.changes:
            lines.append("nothing to change")
        return "\n".join(lines)


MARKS = {"right": "[right]", "change": "[change]", "fixed": "[as is]"}


def diagnose(explanation: ExplanationFields) -> Diagnosis:
    """Group what `mpass.explain` found by cause, with what to do about each.

    explanation: of a model that ran, so that it tells what ran sparse and what ran dense.
    """
    pairs = [
        (site, cost)
        for graph in explanation.graphs
        for site, cost in zip(graph.sites, graph.costs, strict=True)
    ]
    found = [*of_attentions(pairs), *of_breaks(explanation), *of_machine(pairs)]
    order = {"change": 0, "fixed": 1, "right": 2}
    found.sort(key=lambda finding: (order[finding.kind], -finding.count))
    sparse = sum(site.status == "sparse" and not cost.reason for site, cost in pairs)
    if not pairs:
        found.append(no_attention(explanation))
    return Diagnosis(explanation.model, len(pairs), sparse, tuple(found))


def no_attention(explanation: ExplanationFields) -> Finding:
    """That nothing was found at all."""
    graphs = len(explanation.graphs)
    what = f"no attention in {graphs} graph{'s' * (graphs != 1)}"
    remedy = (
        "compile the module that holds the layers; attention is found as "
        "scaled_dot_product_attention, flex_attention, or a softmax between two products"
    )
    return Finding("change", what, "", "", remedy, 0)


def of_attentions(pairs: Sequence[tuple[SiteReport, SiteCost]]) -> Iterator[Finding]:
    """A finding per cause: planned dense, ran dense, ran sparse."""
    groups: dict[tuple[str, str], list[SiteReport]] = {}
    first: dict[tuple[str, str], str] = {}
    for site, cost in pairs:
        if site.reason:
            key, words = ("planned", alike(site.reason)), site.reason
        elif cost.reason:
            key, words = ("ran", alike(cost.reason)), cost.reason
        else:
            key, words = ("sparse", ""), ""
        groups.setdefault(key, []).append(site)
        first.setdefault(key, words)
    for key, sites in groups.items():
        where, source = places(sites), sites[0].source
        if key[0] == "sparse":
            yield Finding("right", "ran sparse", where, source, "", len(sites))
            continue
        words = first[key]
        remedy = remedy_of(words) if key[0] == "planned" else remedy_of_run(words)
        kind = "fixed" if remedy.startswith("nothing") else "change"
        what = f"dense: {words}" if key[0] == "planned" else f"planned sparse, ran dense: {words}"
        yield Finding(kind, what, where, source, remedy, len(sites))


def alike(reason: str) -> str:
    """A reason without its numbers."""
    return re.sub(r"[0-9.]+", "#", reason)


def remedy_of_run(reason: str) -> str:
    """What to do where an op chose dense attention."""
    found = (remedy for pattern, remedy in RAN_DENSE if re.search(pattern, reason))
    return next(found, NOTHING)


def places(sites: Sequence[SiteReport]) -> str:
    """`layers 0-3, 7`, or modules where layers are unknown."""
    numbers = [site.layer for site in sites]
    if all(number >= 0 for number in numbers):
        return f"layer{'s' * (len(set(numbers)) > 1)} {in_spans(sorted(set(numbers)))}"
    return ", ".join(list(dict.fromkeys(site.path for site in sites if site.path))[:4])


def of_breaks(explanation: ExplanationFields) -> Iterator[Finding]:
    """Where Dynamo broke the model: what stands between graphs is not compiled."""
    for item in explanation.breaks:
        yield Finding(
            kind="change",
            what=f"graph break: {item.reason.splitlines()[0]}",
            where="",
            source=item.source,
            remedy='write that line without the break; TORCH_LOGS="graph_breaks" shows every place',
            count=0,
        )


def of_machine(pairs: Sequence[tuple[SiteReport, SiteCost]]) -> Iterator[Finding]:
    """What is missing here for kernels to be built and kept."""
    if any(cost.lowering in ("cpu", "reference", "dense") for _, cost in pairs):
        from mpass.lowering.cpu.support import machine_reason

        fault = machine_reason()
        if fault:
            remedy = "install g++ 11 or newer, or point CXX to a compiler: plain torch runs instead"
            yield Finding("change", fault, "", "", remedy, 0)
    folder = cache_dir()
    parent = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(parent, os.W_OK):
        remedy = (
            "set MPASS_CACHE to a folder that can be written; until then kernels are built anew"
        )
        yield Finding("change", f"the cache {folder} cannot be written", "", "", remedy, 0)
