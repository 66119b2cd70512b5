"""`mpass calibrate`: search a pattern per head for a model, and say what it is worth."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, STANDARD_OUTPUT, check_output
from mpass.cli.progress import compiling_told_to
from mpass.models.texts import find_text

RETRIEVAL_TASKS = ("niah_single_2", "passkey")
"""Retrieval prompts of a search; the answers of held-out ones come from other seeds."""

SHORT_PROMPT = 1024
"""Tokens of the retrieval prompts that are run layer by layer."""


def calibrate(
    model: prompt.MODEL,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Texts to search on, best of several kinds: names or files."),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Texts to check on; the rest of --text if not given.")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option("--length", "--lengths", help="Tokens of the texts, separated by commas."),
    ] = "8192",
    check_lengths: Annotated[
        str | None, typer.Option(help="Tokens of the held-out texts; --lengths if not given.")
    ] = None,
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            "--patterns",
            help="Candidates, as NAME or 'NAME(8, 64)'; many if not given.",
            autocompletion=prompt.starting(prompt.PATTERNS),
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Attention time as a share of that of dense attention.")
    ] = 0.25,
    speed: Annotated[
        str | None,
        typer.Option(help="Instead of a budget: times as fast as dense attention, such as 4x."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: most predicted divergence, nats per token."),
    ] = None,
    retrieval_weight: Annotated[
        float, typer.Option(help="Weight of retrieval answers beside texts; 0 for none.")
    ] = 0.3,
    retrieval_lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of retrieval prompts; those of 1024 and less are also run layer by layer. "
            "1024 and the longest of --lengths if not given."
        ),
    ] = None,
    dtype: prompt.DTYPE = "fp32",
    device: prompt.DEVICE = "cpu",
    state: Annotated[
        Path | None, typer.Option(help="File to resume from; OUTPUT.state if not given.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the heatmap here (SVG).")] = None,
    as_json: AS_JSON = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The config to write; - is standard output."
        ),
    ] = Path("minference.json"),
) -> None:
    """Search which pattern each head should use, under a budget; write a config.

    Measures every pattern on every head, how much each layer matters, and what the kernels cost
    here; checks the choice on text that the search did not see. Can be stopped and started again.
    """
    check_output(output)
    check_output(picture, "picture")
    check_output(state or resume_file(output), "state")
    text_lengths = parse_lengths("lengths", lengths)
    checked_lengths = parse_lengths("check_lengths", check_lengths or lengths)
    if retrieval_lengths is None:
        prompt_lengths = sorted({SHORT_PROMPT, max(text_lengths)})
    else:
        prompt_lengths = parse_lengths("retrieval_lengths", retrieval_lengths)
    for name in (*(text or ()), *(held_out or ())):
        find_text(name)
    from mpass.calibration.report import check_table, choice_table, heatmap
    from mpass.calibration.search import Settings, run_calibration
    from mpass.calibration.settings import check_settings
    from mpass.config.pattern_text import parse_pattern
    from mpass.models.load import check_device, load_model, parse_dtype

    check_device(device)
    settings = Settings(
        budget=budget_of(budget, speed, max_loss),
        max_loss=max_loss,
        retrieval_weight=retrieval_weight,
    )
    check_settings(settings)
    candidates = [parse_pattern(pattern) for pattern in patterns] if patterns else None
    console = Console(stderr=as_json or output == STANDARD_OUTPUT)
    loaded, tokenizer = load_model(model, dtype=parse_dtype(dtype), device=device)
    searched, checked = make_inputs(
        tokenizer,
        text or ["code"],
        held_out,
        text_lengths,
        checked_lengths,
        prompt_lengths if retrieval_weight > 0 else [],
    )
    start = time.perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=None)

        def on_progress(step: str, done: int, total: int) -> None:
            progress.update(bar, description=step, completed=done, total=total)

        with compiling_told_to(lambda text: progress.update(bar, description=text or "at work")):
            outcome = run_calibration(
                loaded,
                searched,
                held_out=checked,
                candidates=candidates,
                settings=settings,
                state=state or resume_file(output),
                on_progress=on_progress,
            )
    if output != STANDARD_OUTPUT:
        outcome.config.save(output)
    if picture is not None:
        picture.write_text(heatmap(outcome), "utf-8")
    console.print(choice_table(outcome))
    if outcome.checks:
        console.print(check_table(outcome))
    console.print(f"wrote {output} after {time.perf_counter() - start:.0f} s")
    if as_json or output == STANDARD_OUTPUT:
        typer.echo(outcome.config.to_json(), nl=False)


def budget_of(budget: float, speed: str | None, max_loss: float | None) -> float | None:
    """The share of dense attention's time that is allowed; None where a loss is named instead.

    Raises OptionValueError for a speed that is none, or that is given beside a loss.
    """
    from mpass.errors import OptionValueError

    if speed is None:
        return None if max_loss is not None else budget
    if max_loss is not None:
        raise OptionValueError("speed", speed, "without --max-loss: one of them decides")
    try:
        times = float(speed.removesuffix("x"))
    except ValueError:
        times = 0.0
    if not 1 <= times < math.inf:
        raise OptionValueError("speed", speed, "how many times as fast, 1 or more: 4x")
    return 1 / times


def resume_file(output: Path) -> Path:
    """Where the measurements of a search are kept beside its config."""
    if output == STANDARD_OUTPUT:
        output = Path("minference.json")
    return output.with_name(output.name + ".state")


def parse_lengths(option: str, text: str) -> list[int]:
    """`4096,8192` as numbers; raises OptionValueError."""
    from mpass.errors import OptionValueError

    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 256:
        raise OptionValueError(option, text, "numbers of tokens, 256 and more, comma separated")
    return lengths


def make_inputs(
    tokenizer: Any,
    texts: list[str],
    held_out: list[str] | None,
    lengths: list[int],
    check_lengths: list[int],
    retrieval_lengths: list[int],
) -> tuple[list[Any], list[Any]]:
    """Inputs to search on and to check on. No text is in both: without held-out texts the checks
    take what follows in the searched ones."""
    from mpass.models.texts import load_tokens

    searched: list[Any] = []
    checked: list[Any] = []
    longest = max(lengths)
    for name in texts:
        content = find_text(name).read()
        searched += [load_tokens(content, tokenizer, length) for length in lengths]
        if held_out is None:
            checked += [
                load_tokens(content, tokenizer, longest + length)[:, longest:]
                for length in check_lengths
            ]
    for name in held_out or ():
        content = find_text(name).read()
        checked += [load_tokens(content, tokenizer, length) for length in check_lengths]
    if retrieval_lengths:
        searched += retrieval_prompts(tokenizer, texts[0], retrieval_lengths, first_seed=1000)
        checked += retrieval_prompts(tokenizer, texts[0], [max(retrieval_lengths)], first_seed=2000)
    return searched, checked


def retrieval_prompts(
    tokenizer: Any, text: str, lengths: list[int], *, first_seed: int
) -> list[Any]:
    """A prompt of each retrieval task and length, hidden in a text."""
    from mpass.evaluate.run import make_sample
    from mpass.evaluate.tasks import make_haystack

    content = find_text(text).read()
    hay = make_haystack(text, content)
    return [
        make_sample(task, length, first_seed + i, None, content, hay, tokenizer)
        for length in lengths
        for i, task in enumerate(RETRIEVAL_TASKS)
    ]
