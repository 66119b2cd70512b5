"""`mpass profile`: what sparse attention does on one prompt, head by head."""

from __future__ import annotations

from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, OUTPUT, check_output, deliver
from mpass.errors import OptionValueError


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
    import torch

    from mpass.inspection.profiling import profile as profile_model

    body, inputs = prompt.load_prompt(model, text, length, dtype, device)
    tell = prompt.tell_progress()
    with torch.inference_mode():
        done = profile_model(
            body, inputs, options=options, max_query_blocks=query_blocks, progress=tell
        )
    tell("")
    deliver(done.as_dict, lambda: str(done), output=output, as_json=as_json, save=done.save)
