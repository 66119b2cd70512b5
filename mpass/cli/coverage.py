"""`mpass coverage`: which model families the pass covers, in which spelling and scenario."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, JSON_OUTPUT, STANDARD_OUTPUT, check_output, deliver
from mpass.errors import OptionValueError

if TYPE_CHECKING:
    from mpass.evaluate.classes import ClassRecord

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
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Run every class of transformers of these kinds instead of families: causal, "
            "image-text, encoder-decoder, encoder; library, for libraries beside transformers; or "
            "tiny models made by hand: perception (pictures and sound), diffusion (diffusers)."
        ),
    ] = None,
    model_type: Annotated[
        list[str] | None,
        typer.Option(help="With --kind: only these, by transformers' model type, or by library."),
    ] = None,
    part: Annotated[
        str, typer.Option(help="With --kind: a part of the classes, as 3/10: the third of ten.")
    ] = "1/1",
    as_json: AS_JSON = False,
    output: JSON_OUTPUT = None,
) -> None:
    """Run tiny models of every family through the pass and compare them with eager.

    One line each: attentions found and made sparse, reasons of the rest, graphs, breaks, largest
    difference. Ends with status 1 if any output differs by more than 1e-4 or any run fails.
    With --kind, the file is one line of JSON per run, and runs that it has are left out.
    """
    check_output(output)
    if kind is not None:
        run_classes(kind, model_type, scenario, part, as_json, output)
        return
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


def run_classes(
    kinds: list[str],
    model_types: list[str] | None,
    scenarios: list[str] | None,
    part: str,
    as_json: bool,
    output: Path | None,
) -> None:
    """Run classes of transformers' mappings, or libraries; go on where a file of records ends."""
    from mpass.evaluate.classes import append, cover_classes, line, read_records, summarise
    from mpass.evaluate.libraries import KIND, cover_libraries
    from mpass.models.classes import CALL, KINDS, LONG, MAPPINGS, PLAIN, ModelClass, model_classes
    from mpass.models.libraries import LIBRARIES

    for name in set(kinds) - {*KINDS, KIND}:
        raise OptionValueError("kind", name, ", ".join((*KINDS, KIND)))
    for name in set(scenarios or ()) - {*PLAIN, CALL, LONG}:
        raise OptionValueError("scenario", name, ", ".join((*PLAIN, CALL, LONG)))
    entries = model_classes(tuple(kind for kind in kinds if kind != KIND))
    libraries = {library.name: library for library in LIBRARIES if KIND in kinds}
    entries += [ModelClass(KIND, name, "") for name in libraries]
    known = {entry.model_type for entry in entries}
    for name in set(model_types or ()) - known:
        raise OptionValueError("model-type", name, ", ".join(sorted(known)))
    first, step = part_of(part)
    entries = [e for e in entries if not model_types or e.model_type in model_types][first::step]

    def covered(entry: ModelClass, have: Collection[str]) -> Iterator[ClassRecord]:
        if entry.kind == KIND:
            return cover_libraries([libraries[entry.model_type]])
        if entry.kind not in MAPPINGS:
            return cover_classes([entry], scenarios)
        return cover_classes([entry], [name for name in wanted if name not in have])

    quiet = as_json or output == STANDARD_OUTPUT
    file = None if output == STANDARD_OUTPUT else output
    records = read_records(file) if file is not None else []
    done: dict[str, set[str]] = {}
    for record in records:
        done.setdefault(record.name, set()).add(record.scenario)
    wanted = scenarios or list(PLAIN)
    for entry in entries:
        have = done.get(entry.name, set())
        if have and not (entry.kind in MAPPINGS and "" not in have and set(wanted) - have):
            continue
        own = []
        for record in covered(entry, have):
            typer.echo(line(record), err=quiet)
            own.append(record)
        records += own
        if file is not None:
            append(own, file)
    told = [
        f"{one.kind}: {one.run} of {one.classes} classes run, {one.sparse} of "
        f"{one.attentions} attentions sparse, {len(one.differ)} differ"
        for one in summarise(records)
    ]
    deliver(
        lambda: [dataclasses.asdict(record) for record in records],
        lambda: "\n".join(told),
        output=None if file is not None else output,
        as_json=as_json,
    )
    if any(one.differ for one in summarise(records)):
        raise typer.Exit(1)


def part_of(text: str) -> tuple[int, int]:
    """The first class and the step of a part that is written as 3/10."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise OptionValueError("part", text, "two numbers, as 3/10 for the third of ten")
    return int(number) - 1, int(count)
