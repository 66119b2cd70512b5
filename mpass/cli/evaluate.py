"""`mpass eval`: what sparse prefill costs in accuracy."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, STANDARD_OUTPUT, as_json_text, check_folder, check_output
from mpass.cli.progress import steps, waiting
from mpass.errors import OptionValueError

ALL_TASKS = "all"


def evaluate(
    model: prompt.MODEL = "smollm2",
    tasks: Annotated[
        str,
        typer.Option(
            help="Retrieval tasks, needle_grid, perplexity and perplexity_sliding, separated by "
            "commas; 'all' for all of them."
        ),
    ] = "niah_single_1,niah_single_2,passkey,perplexity",
    lengths: Annotated[
        str, typer.Option("--length", "--lengths", help="Tokens, separated by commas.")
    ] = "4096",
    patterns: Annotated[
        str,
        typer.Option(
            "--pattern",
            "--patterns",
            help="Patterns as in `mpass demo`, separated by semicolons; 'auto' is the backend's "
            "own choice.",
        ),
    ] = "auto",
    samples: Annotated[int, typer.Option(help="Seeds of each task and length.")] = 5,
    text: prompt.TEXT = prompt.FIRST_TEXT,
    dtype: prompt.DTYPE = "bf16",
    device: prompt.DEVICE = "cpu",
    min_seq_len: Annotated[int, typer.Option(help="Prompts shorter than this stay dense.")] = 0,
    inner_backend: prompt.INNER_BACKEND = "eager",
    generate: Annotated[
        bool, typer.Option(help="Also score what dense decoding writes after the prefill.")
    ] = True,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write pictures (SVG) there.")
    ] = None,
    as_json: AS_JSON = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON lines; what is in there is not measured again. - is standard output, where "
            "nothing is.",
        ),
    ] = Path("eval.jsonl"),
) -> None:
    """Measure what sparse prefill costs in accuracy: retrieval, scored strictly, and perplexity.

    The answer of a retrieval task stands inside the sparse prefill, and each of its tokens must be
    the most likely one. Perplexity is compared with dense attention on the same windows of text.
    """
    check_output(output)
    # transformers warns that generation leaves the model's positions: the last tokens may.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with waiting("Starting"):
        from mpass.evaluate.charts import write_plots
        from mpass.evaluate.plan import GRID, LOSSES, Plan, check_plan, list_inputs
        from mpass.evaluate.run import evaluate as run_plan
        from mpass.evaluate.summary import summarize
        from mpass.evaluate.tables import render_summaries
        from mpass.evaluate.tasks import TASKS

        names = split_list(tasks, ",")
        plan = Plan(
            model=model,
            tasks=(*TASKS, GRID, *LOSSES) if names == (ALL_TASKS,) else names,
            lengths=tuple(parse_int("lengths", item) for item in split_list(lengths, ",")),
            patterns=split_list(patterns, ";"),
            samples=samples,
            text=text,
            dtype=dtype,
            device=device,
            min_seq_len=min_seq_len,
            inner_backend=inner_backend,
            generate=generate,
        )
        check_plan(plan)
        check_folder(plots, "plots")
    with tempfile.TemporaryDirectory() as folder, steps(len(list(list_inputs(plan)))) as tell:
        kept = Path(folder) / "eval.jsonl" if output == STANDARD_OUTPUT else output
        lines = run_plan(plan, kept, tell)
    summaries = summarize(lines)
    if output == STANDARD_OUTPUT:
        typer.echo("".join(json.dumps(line) + "\n" for line in lines), nl=False)
    elif as_json:
        typer.echo(as_json_text([dataclasses.asdict(item) for item in summaries]), nl=False)
    else:
        Console().print(render_summaries(summaries))
    if plots is not None:
        for path in write_plots(plots, lines, summaries):
            typer.echo(f"Wrote {path}", err=as_json or output == STANDARD_OUTPUT)


def split_list(text: str, separator: str) -> tuple[str, ...]:
    """The parts of an option that holds several values."""
    return tuple(part.strip() for part in text.split(separator) if part.strip())


def parse_int(name: str, text: str) -> int:
    """A whole number given to an option; raises OptionValueError."""
    try:
        return int(text)
    except ValueError:
        raise OptionValueError(name, text, "whole numbers, separated by commas") from None
