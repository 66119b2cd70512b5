"""`mpass demo`: one long prompt through a real model, dense and sparse."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, OUTPUT, check_output, deliver
from mpass.cli.progress import progress_console, steps, waiting
from mpass.models.texts import TEXTS

if TYPE_CHECKING:
    from mpass.evaluate.demo import DemoSettings

TEXT_HELP = "Text of the prompt: a UTF-8 file, or " + ", ".join(
    f"{text.name} ({text.title}; {text.license})" for text in TEXTS.values()
)


def demo(
    model: Annotated[
        str, typer.Option(help=prompt.MODEL_HELP, autocompletion=prompt.starting(prompt.MODELS))
    ] = "smollm2",
    text: Annotated[
        str, typer.Option(help=TEXT_HELP, autocompletion=prompt.starting(TEXTS))
    ] = prompt.FIRST_TEXT,
    length: prompt.LENGTH = 8192,
    pattern: prompt.PATTERN = None,
    config: prompt.CONFIG = None,
    dtype: prompt.DTYPE = "bf16",
    device: prompt.DEVICE = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed prefills of each kind, interleaved.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each generates.")] = 16,
    min_seq_len: prompt.MIN_SEQ_LEN = None,
    inner_backend: prompt.INNER_BACKEND = "inductor",
    as_json: AS_JSON = False,
    output: OUTPUT = None,
) -> None:
    """Run one long prompt through a real model, dense and sparse, and compare.

    Prints the attention sites that were rewritten, the density that was really computed, prefill
    seconds, the text's perplexity, how often the next-token predictions agree, and the words that
    each generates. With `-o FILE.html` the prompt is profiled after that, and the page of the
    profile is saved.
    """
    check_output(output)
    # transformers warns that generation leaves the model's positions: 8192 and a few tokens do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with waiting("Starting"):  # importing torch and transformers takes seconds
        from mpass.evaluate.demo import DemoSettings, check_settings, render, run_demo

        settings = DemoSettings(
            model=model,
            text=text,
            length=length,
            pattern=pattern,
            config=None if config is None else str(config),
            dtype=dtype,
            device=device,
            repeats=repeats,
            new_tokens=new_tokens,
            min_seq_len=min_seq_len,
            inner_backend=inner_backend,
        )
        check_settings(settings)
    with steps(settings.steps) as on_progress:
        result = run_demo(settings, on_progress, tell)

    def save(target: Path) -> None:
        if target.suffix == ".html":
            save_page(settings, target)
        else:
            result.write(target)

    deliver(
        lambda: dataclasses.asdict(result),
        lambda: render(result),
        output=output,
        as_json=as_json,
        save=save,
    )


def tell(line: str) -> None:
    """A figure, as soon as it is known."""
    progress_console().print(line, soft_wrap=True, markup=False, highlight=False)


def save_page(settings: DemoSettings, target: Path) -> None:
    """Profile the prompt of a demo and save the page."""
    import torch

    from mpass.inspection.profiling import profile

    body, inputs = prompt.load_prompt(
        settings.model, settings.text, settings.length, settings.dtype, settings.device
    )
    options = {name: value for name, value in settings.options().items() if name != "inner_backend"}
    told = prompt.tell_progress()
    with torch.inference_mode():
        done = profile(
            body,
            inputs,
            options=options,
            progress=told,
            tokens=prompt.token_texts(settings.model, inputs["input_ids"], settings.dtype),
            about={
                "model": settings.model,
                "prompt": f"{settings.length} tokens of {settings.text}",
            },
        )
    done.save(target)
    told("")
