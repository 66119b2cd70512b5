"""`mpass coverage`: which model families the pass covers, in which spelling and scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpass.cli.prompt import check_output
from mpass.errors import OptionValueError


def coverage(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the records here (JSON).")
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="Only these families, by name; all if not given.")
    ] = None,
    spelling: Annotated[
        list[str] | None, typer.Option(help="Only these: sdpa, eager, flex_attention.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only these scenarios, by name; all if not given.")
    ] = None,
) -> None:
    """Run tiny models of every family through the pass and compare them with eager.

    One line each: attentions found and made sparse, reasons of the rest, graphs, breaks, largest
    difference. Ends with status 1 if any output differs by more than 1e-4 or any run fails.
    """
    check_output(output)
    from mpass.evaluate.coverage import IMPLEMENTATIONS, CoverageRecord, save, summary
    from mpass.evaluate.coverage import coverage as records_of
    from mpass.models.tiny import FAMILIES, SCENARIOS, Scenario

    families = [f for f in FAMILIES if family is None or f.name in family]
    for name in set(family or ()) - {f.name for f in families}:
        raise OptionValueError("family", name, ", ".join(f.name for f in FAMILIES))
    for name in set(scenario or ()) - {s.name for s in SCENARIOS}:
        raise OptionValueError("scenario", name, ", ".join(s.name for s in SCENARIOS))

    for name in set(spelling or ()) - set(IMPLEMENTATIONS):
        raise OptionValueError("spelling", name, ", ".join(IMPLEMENTATIONS))

    def wanted(candidate: Scenario) -> bool:
        return scenario is None or candidate.name in scenario

    records: list[CoverageRecord] = []
    for record in records_of(families, spelling or IMPLEMENTATIONS, wanted):
        typer.echo(summary([record]))
        records.append(record)
    if output is not None:
        save(records, output)
    sparse, sites = sum(r.rewritten for r in records), sum(r.sites for r in records)
    wrong = [record for record in records if not record.equal]
    typer.echo(f"{len(records)} runs, {sparse} of {sites} attentions sparse, {len(wrong)} differ")
    if wrong:
        raise typer.Exit(1)
