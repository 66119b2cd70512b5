"""The record of what the pass covers: families x spellings x scenarios.

Every model is tiny and random, runs eagerly and through the pass with full budgets, and both
outputs are compared at the tokens that are no padding.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpass.files import write_whole
from mpass.models.tiny import (
    FAMILIES,
    Family,
    Scenario,
    build,
    inputs,
    main_output,
    real_rows,
    scenarios,
)

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
"""How a model of transformers may spell its attention."""

FULL_BUDGET: dict[str, Any] = {
    "inner_backend": "eager",
    "min_seq_len": 8,
    "dense_above": 2.0,
    "pattern": "block_sparse",
}
"""Options under which sparse attention computes everything, at any length from 8 tokens on.

block_sparse keeps 100 blocks of 64 keys per query block: all of them below 6,400 tokens."""


@dataclass(frozen=True)
class CoverageRecord:
    """What became of one model in one scenario.

    sites: attentions found; rewritten: of these, sparse; dense: reasons of the others, with how
    often each. graphs, breaks: of Dynamo. difference: largest of the outputs to eager, over tokens
    that are no padding. error: what was raised, if anything. seconds: of all of it.
    """

    family: str
    implementation: str
    scenario: str
    sites: int = 0
    rewritten: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    graphs: int = 0
    breaks: int = 0
    difference: float = 0.0
    error: str = ""
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether the output is that of eager (fp32, 1e-4)."""
        return not self.error and self.difference <= 1e-4


def coverage(
    families: Iterable[Family] = FAMILIES,
    implementations: Iterable[str] = IMPLEMENTATIONS,
    only: Callable[[Scenario], bool] = lambda scenario: True,
) -> Iterator[CoverageRecord]:
    """Records of the matrix, one by one as they are made."""
    for family in families:
        for implementation in implementations:
            if implementation not in family.implementations:
                continue
            model = build(family, implementation)
            for scenario in filter(only, scenarios(family)):
                if implementation == "flex_attention" and scenario.cached:
                    continue  # torch's own C++ for its block masks does not compile there
                yield cover(family, model, implementation, scenario)


def cover(
    family: Family, model: nn.Module, implementation: str, scenario: Scenario
) -> CoverageRecord:
    """Run one model in one scenario, eagerly and through the pass."""
    started = time.perf_counter()
    names = (family.name, implementation, scenario.name)
    try:
        call = inputs(family, model, scenario)
        with torch.no_grad():
            expected = main_output(model(**inputs(family, model, scenario)))
            run = run_compiled(model, call)
    except Exception as error:  # recorded, so that one model does not hide the others
        return CoverageRecord(*names, error=f"{type(error).__name__}: {error}"[:500])
    return CoverageRecord(
        *names,
        sites=len(run.sites),
        rewritten=sum(site.status == "sparse" for site in run.sites),
        dense=dict(Counter(site.reason for site in run.sites if site.status != "sparse")),
        graphs=run.graphs,
        breaks=run.breaks,
        difference=largest_difference(run.output, expected, real_rows(family, call)),
        seconds=round(time.perf_counter() - started, 2),
    )


@dataclass(frozen=True)
class CompiledRun:
    """Output of a compiled call and what the pass did in it.

    again: how many sparse attentions ran by a graph that had served another layer already: where a
    graph breaks in every layer, one serves all that it fits, and `sites` has its attention once.
    """

    output: Tensor
    sites: list[Any]
    graphs: int
    breaks: int
    again: int = 0


def run_compiled(
    model: nn.Module, *calls: dict[str, Any], options: Mapping[str, Any] = FULL_BUDGET
) -> CompiledRun:
    """Calls through the pass, one after the other, with the last one's graphs and output.

    A call that needs no graph of its own has those of the call before.
    """
    from torch._dynamo.utils import counters

    from mpass.backend import minference
    from mpass.lowering.recorder import record
    from mpass.report import reports

    sites: list[Any] = []
    graphs = 0

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        compiled = minference(gm, example_inputs, options=dict(options))
        if not graphs:
            sites.clear()
        sites.extend(reports()[-1].sites)
        graphs += 1
        return compiled

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    for call in calls:
        graphs = 0
        with record() as log:
            output = main_output(compiled(**call))
    breaks = sum(counters["graph_break"].values())
    ran = sum(made.lowering != "dense" for made in log.calls)
    sparse = sum(site.status == "sparse" for site in sites)
    return CompiledRun(output, sites, graphs, breaks, again=max(0, ran - sparse))


def largest_difference(output: Tensor, expected: Tensor, rows: Tensor | None) -> float:
    """Largest difference of two outputs [B, N, ...], over rows [B, N] where some are left out."""
    difference = (output.double() - expected.double()).abs()
    if rows is not None:
        difference = difference[rows]
    return float(difference.max())


def save(records: Iterable[CoverageRecord], path: str | os.PathLike[str]) -> None:
    """Write records as JSON, one object each."""
    text = json.dumps([asdict(record) for record in records], indent=1)
    write_whole(Path(path), text + "\n")


def summary(records: Iterable[CoverageRecord]) -> str:
    """The matrix in lines of text: per model and scenario, what was rewritten and how near."""
    lines = []
    for record in records:
        name = f"{record.family:16} {record.implementation:14} {record.scenario:22}"
        if record.error:
            lines.append(f"{name} {record.error}")
            continue
        reasons = "; ".join(f"{count} x {reason}" for reason, count in record.dense.items())
        lines.append(
            f"{name} {record.rewritten}/{record.sites} sparse, {record.graphs} graphs, "
            f"{record.breaks} breaks, {record.difference:.1e}" + (f"  [{reasons}]" * bool(reasons))
        )
    return "\n".join(lines)
