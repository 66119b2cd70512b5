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
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Run every class of transformers of these kinds instead of families: causal, "
            "image-text, encoder-decoder."
        ),
    ] = None,
    model_type: Annotated[
        list[str] | None, typer.Option(help="With --kind: only these, by transformers' model type.")
    ] = None,
    part: Annotated[
        str, typer.Option(help="With --kind: a part of the classes, as 3/10: the third of ten.")
    ] = "1/1",
) -> None:
    """Run tiny models of every family through the pass and compare them with eager.

    One line each: attentions found and made sparse, reasons of the rest, graphs, breaks, largest
    difference. Ends with status 1 if any output differs by more than 1e-4 or any run fails.
    With --kind, the file is one line of JSON per run, and classes that it has are left out.
    """
    check_output(output)
    if kind is not None:
        run_classes(kind, model_type, scenario, part, output)
        return
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


def run_classes(
    kinds: list[str],
    model_types: list[str] | None,
    scenarios: list[str] | None,
    part: str,
    output: Path | None,
) -> None:
    """Run classes of transformers' mappings; go on where a file of records ends."""
    from mpass.evaluate.classes import append, cover_classes, line, read_records, summarise
    from mpass.models.classes import MAPPINGS, PLAIN, model_classes

    for name in set(kinds) - set(MAPPINGS):
        raise OptionValueError("kind", name, ", ".join(MAPPINGS))
    for name in set(scenarios or ()) - set(PLAIN):
        raise OptionValueError("scenario", name, ", ".join(PLAIN))
    entries = model_classes(tuple(kinds))
    known = {entry.model_type for entry in entries}
    for name in set(model_types or ()) - known:
        raise OptionValueError("model-type", name, ", ".join(sorted(known)))
    first, step = part_of(part)
    entries = [e for e in entries if not model_types or e.model_type in model_types][first::step]
    records = read_records(output) if output is not None else []
    done = {record.name for record in records}
    for entry in entries:
        if entry.name in done:
            continue
        own = []
        for record in cover_classes([entry], scenarios):
            typer.echo(line(record))
            own.append(record)
        records += own
        if output is not None:
            append(own, output)
    for one in summarise(records):
        typer.echo(
            f"{one.kind}: {one.run} of {one.classes} classes run, {one.sparse} of "
            f"{one.attentions} attentions sparse, {len(one.differ)} differ"
        )
    if any(one.differ for one in summarise(records)):
        raise typer.Exit(1)


def part_of(text: str) -> tuple[int, int]:
    """The first class and the step of a part that is written as 3/10."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise OptionValueError("part", text, "two numbers, as 3/10 for the third of ten")
    return int(number) - 1, int(count)
