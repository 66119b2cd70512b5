"""What an explanation and a profile consist of: plain data, for tables and pages to show."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpass.inspection.looks import QueryLooks
from mpass.inspection.outline import Outline
from mpass.lowering.kernel_sources import KernelSource
from mpass.report import SiteReport


@dataclass(frozen=True)
class SiteCost:
    """What one attention is predicted to cost, and what it did cost on this input.

    num_queries, num_keys: lengths when it was compiled; predicted: per head, the most that
    estimation and attention cost over the work of dense attention; density: per head, the share of
    the mask's cells that was computed, empty if the attention did not run; lowering: what ran it,
    and reason why if that was dense attention; index_bytes: memory of its index.
    """

    num_queries: int
    num_keys: int
    predicted: tuple[float, ...]
    density: tuple[float, ...] = ()
    lowering: str = ""
    reason: str = ""
    index_bytes: int = 0


@dataclass(frozen=True)
class GraphExplanation:
    """One captured graph.

    sites, details and costs: one per attention, in order; ops: calls by name before and after;
    seconds: per pass; mask_bytes: the largest mask that the rewrite made unnecessary.
    """

    sites: tuple[SiteReport, ...]
    details: tuple[dict[str, Any], ...]
    costs: tuple[SiteCost, ...]
    ops_before: dict[str, int]
    ops_after: dict[str, int]
    outline_before: Outline
    outline_after: Outline
    captured: str
    rewritten: str
    seconds: dict[str, float]
    mask_bytes: int


@dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo ended a graph early. source: the user's line."""

    reason: str
    source: str


@dataclass(frozen=True)
class ExplanationFields:
    """What became of a model, graph by graph.

    provenance: names and values of what was run where, see mpass.inspection.provenance.
    """

    model: str
    graphs: tuple[GraphExplanation, ...]
    breaks: tuple[GraphBreak, ...]
    min_seq_len: int
    provenance: tuple[tuple[str, str], ...] = ()

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """Every attention of every graph."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def ran(self) -> tuple[int, int]:
        """How many of the attentions that were planned sparse ran sparse, and how many dense."""
        ran = [c for g in self.graphs for c in g.costs if c.lowering]
        dense = sum(bool(cost.reason) for cost in ran)
        return len(ran) - dense, dense

    @property
    def reasons(self) -> Counter[str]:
        """Why attentions stay dense, with how many do."""
        return Counter(site.reason for site in self.sites if site.reason)

    @property
    def index_bytes(self) -> int:
        """Memory of the largest index: one lives at a time."""
        return max((cost.index_bytes for g in self.graphs for cost in g.costs), default=0)

    @property
    def mask_bytes(self) -> int:
        """Memory of the largest mask that is no longer made."""
        return max((graph.mask_bytes for graph in self.graphs), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the graphs' code and drawings, fit for JSON."""
        hidden = ("captured", "rewritten", "outline_before", "outline_after")
        graphs = [
            dataclasses.asdict(
                dataclasses.replace(graph, outline_before=None, outline_after=None)  # type: ignore[arg-type]
            )
            for graph in self.graphs
        ]
        return {
            "model": self.model,
            "min_seq_len": self.min_seq_len,
            "provenance": dict(self.provenance),
            "breaks": [dataclasses.asdict(item) for item in self.breaks],
            "graphs": [{k: v for k, v in graph.items() if k not in hidden} for graph in graphs],
        }


@dataclass(frozen=True)
class Shares:
    """Share of the mask's cells that are looked at, and of the exact attention on them."""

    density: float
    recall: float


@dataclass(frozen=True)
class HeadProfile:
    """One query head of one layer.

    density: share of the mask's cells that the index selects; recall: share of the exact attention
    on them, mean over queries; both are of the plan: see `LayerProfile.dense_reason`; worst: query
    block, key block and the share of that query block's attention that was lost between them;
    advice: what to do about it, "" for nothing; error: how far the output is off, relative to the
    exact one, on the rows that mpass.lowering.meter read of what ran (Loss.error), 0 where dense
    attention ran; output_error: the same of the plan, over the queries that recall is of, in fp32,
    None where it was not measured.
    """

    head: int
    pattern: str
    density: float
    recall: float
    worst: tuple[int, int, float]
    advice: str
    error: float = 0.0
    output_error: float | None = None

    @property
    def lost_mass(self) -> float:
        """The share of the exact attention on keys that are not looked at."""
        return 1.0 - self.recall


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """One sparse attention.

    lowering: what ran it ("dense" where the op found that cheaper); dense_reason: why every key was
    looked at instead of those that the heads selected, "" where it was not; index_seconds,
    attention_seconds: of a second, unobserved run; query_blocks: those whose recall was measured;
    computed, exact: uint8 [H, R, R], see mpass.inspection.recall.Recall; dense_seconds: of dense
    attention on the same inputs, alone, 0.0 where it was not timed; looks: what its heads see from
    single query tokens.
    """

    layer: int
    path: str
    lowering: str
    dense_reason: str
    num_queries: int
    num_keys: int
    index_bytes: int
    index_seconds: float
    attention_seconds: float
    query_blocks: tuple[int, ...]
    all_queries: bool
    heads: tuple[HeadProfile, ...]
    computed: Tensor
    exact: Tensor
    dense_seconds: float = 0.0
    looks: QueryLooks | None = None

    @property
    def output_error(self) -> float | None:
        """Of what its heads select, mean over heads; None where it was not measured."""
        errors = [head.output_error for head in self.heads if head.output_error is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def planned(self) -> Shares:
        """What its heads select, mean over heads."""
        count = max(1, len(self.heads))
        density = sum(head.density for head in self.heads) / count
        return Shares(density, sum(head.recall for head in self.heads) / count)

    @property
    def ran(self) -> Shares:
        """What was computed, mean over heads: everything where it ran dense."""
        return Shares(1.0, 1.0) if self.dense_reason else self.planned


@dataclass(frozen=True, eq=False)
class ProfileFields:
    """What happened on a prompt.

    seconds: of one run, by part ("index", "attention", "dense attention", "rest"; dense attention
    that an op of ours ran counts as such); kernels: the generated sources in use; tokens: the
    prompt's own tokens as text, empty where they are not known.
    """

    explanation: ExplanationFields
    layers: tuple[LayerProfile, ...]
    seconds: dict[str, float]
    kernels: tuple[KernelSource, ...]
    tokens: tuple[str, ...] = ()

    @property
    def dense_layers(self) -> tuple[LayerProfile, ...]:
        """Those that were planned sparse and ran dense."""
        return tuple(layer for layer in self.layers if layer.dense_reason)

    def worst_heads(self, count: int) -> list[tuple[LayerProfile, HeadProfile]]:
        """The heads that lost most of their attention, worst first; dense runs lose nothing."""
        sparse = [layer for layer in self.layers if not layer.dense_reason]
        pairs = [(layer, head) for layer in sparse for head in layer.heads]
        return sorted(pairs, key=lambda pair: pair[1].recall)[:count]

    def as_dict(self) -> dict[str, Any]:
        """Everything but maps, graphs and sources, fit for JSON."""
        hidden = ("computed", "exact", "heads", "looks")
        layers = []
        for layer in self.layers:
            names = [field.name for field in dataclasses.fields(layer) if field.name not in hidden]
            values = {name: getattr(layer, name) for name in names}
            heads = [
                dataclasses.asdict(head) | {"lost_mass": head.lost_mass} for head in layer.heads
            ]
            layers.append(values | {"output_error": layer.output_error, "heads": heads})
        return self.explanation.as_dict() | {"seconds": self.seconds, "layers": layers}
