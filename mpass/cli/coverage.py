"""`mpass coverage`: which model families the pass covers, in which spelling and scenario."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, JSON_OUTPUT, STANDARD_OUTPUT, check_output, deliver
from mpass.errors import OptionValueError

SPELLINGS = ("sdpa", "eager", "flex_attention")


def coverage(
    family: Annotated[
        list[str] | None, typer.Option(help="Only these families, by name; all if not given.")
    ] = None,
    spelling: Annotated[
        list[str] | None,
        typer.Option(
            metavar=f"[{'|'.join(SPELLINGS)}]",
            help="Only these; all if not given.",
            autocompletion=prompt.starting(SPELLINGS),
        ),
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Only these scenarios, by name; all if not given.")
    ] = None,
    as_json: AS_JSON = False,
    output: JSON_OUTPUT = None,
) -> None:
    """Run tiny models of every family through the pass and compare them with eager.

    One line each: attentions found and made sparse, reasons of the rest, graphs, breaks, largest
    difference. Ends with status 1 if any output differs by more than 1e-4 or any run fails.
    """
    check_output(output)
    from mpass.evaluate.coverage import CoverageRecord, summary
    from mpass.evaluate.coverage import coverage as records_of
    from mpass.models.tiny import FAMILIES, SCENARIOS, Scenario

    families = [f for f in FAMILIES if family is None or f.name in family]
    for name in set(family or ()) - {f.name for f in families}:
        raise OptionValueError("family", name, ", ".join(f.name for f in FAMILIES))
    for name in set(scenario or ()) - {s.name for s in SCENARIOS}:
        raise OptionValueError("scenario", name, ", ".join(s.name for s in SCENARIOS))

    for name in set(spelling or ()) - set(SPELLINGS):
        raise OptionValueError("spelling", name, ", ".join(SPELLINGS))

    def wanted(candidate: Scenario) -> bool:
        return scenario is None or candidate.name in scenario

    records: list[CoverageRecord] = []
    for record in records_of(families, spelling or SPELLINGS, wanted):
        typer.echo(summary([record]), err=as_json or output == STANDARD_OUTPUT)
        records.append(record)
    sparse, sites = sum(r.rewritten for r in records), sum(r.sites for r in records)
    wrong = [record for record in records if not record.equal]
    told = f"{len(records)} runs, {sparse} of {sites} attentions sparse, {len(wrong)} differ"
    deliver(
        lambda: [dataclasses.asdict(record) for record in records],
        lambda: told,
        output=output,
        as_json=as_json,
    )
    if wrong:
        raise typer.Exit(1)
