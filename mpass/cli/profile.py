"""`mpass profile`: what sparse attention does on one prompt, head by head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, OUTPUT, check_output, deliver
from mpass.errors import OptionValueError

if TYPE_CHECKING:
    from mpass.inspection.profiling import Profile


def profile(
    model: prompt.MODEL,
    text: prompt.TEXT = "code",
    length: prompt.LENGTH = 8192,
    pattern: prompt.PATTERN = None,
    config: prompt.CONFIG = None,
    dtype: prompt.DTYPE = "bf16",
    device: prompt.DEVICE = "cpu",
    min_seq_len: prompt.MIN_SEQ_LEN = None,
    query_blocks: Annotated[
        int,
        typer.Option(help="Blocks of 64 queries compared with exact attention; 0 for all."),
    ] = 64,
    query_token: Annotated[
        list[int] | None,
        typer.Option(
            help="Positions of tokens whose keys and exact weights the page shows; 16 over the "
            "prompt if not given."
        ),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Another pattern, or the file of a config, that the page shows beside.",
            autocompletion=prompt.starting(prompt.PATTERNS),
        ),
    ] = None,
    as_json: AS_JSON = False,
    output: OUTPUT = None,
) -> None:
    """Compare a model's sparse attention with the exact one on a prompt, head by head.

    Prints density, recall and times per layer and what to do about the worst heads; a page for
    `--output FILE.html` shows what every head looks at.
    """
    check_output(output)
    if query_blocks < 0:
        raise OptionValueError("query-blocks", query_blocks, "0 for all blocks, or a number")
    prompt.check_prompt(text, length, dtype, device)
    options = prompt.pass_options(pattern, config, min_seq_len)
    second = second_options(beside, min_seq_len, output)
    for position in query_token or ():
        if not 0 <= position < length:
            raise OptionValueError("query-token", position, f"0 to {length - 1}")
    import torch

    from mpass.inspection.profiling import profile as profile_model

    body, inputs = prompt.load_prompt(model, text, length, dtype, device)
    tell = prompt.tell_progress()
    about = {"model": model, "prompt": f"{length} tokens of {text}"}
    tokens = prompt.token_texts(model, inputs["input_ids"], dtype)

    def run(chosen: dict[str, Any]) -> Profile:
        with torch.inference_mode():
            return profile_model(
                body,
                inputs,
                options=chosen,
                max_query_blocks=query_blocks,
                progress=tell,
                tokens=tokens,
                queries=query_token or (),
                about=about,
            )

    done = run(options)
    other = None
    if second is not None:
        torch._dynamo.reset()
        other = run(second)
    tell("")

    def save(target: Path) -> None:
        done.save(target, beside=other)

    deliver(done.as_dict, lambda: str(done), output=output, as_json=as_json, save=save)


def second_options(
    beside: str | None, min_seq_len: int | None, output: Path | None
) -> dict[str, Any] | None:
    """Options of the run that the page shows beside; None for none."""
    if beside is None:
        return None
    if output is None or output.suffix != ".html":
        raise OptionValueError("beside", beside, "with --output FILE.html, whose page shows it")
    file = Path(beside)
    if file.suffix == ".json" or file.is_file():
        return prompt.pass_options(None, file, min_seq_len)
    return prompt.pass_options(beside, None, min_seq_len)
