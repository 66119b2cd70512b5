"""`mpass draw`: pictures of patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, check_output, deliver
from mpass.errors import OptionValueError


def draw(
    patterns: Annotated[
        list[str],
        typer.Argument(
            help="NAME or 'NAME(1000, 512)'; see `mpass patterns`.",
            autocompletion=prompt.starting(prompt.PATTERNS),
        ),
    ],
    tokens: Annotated[int, typer.Option(help="Tokens of the made-up prompt.")] = 4096,
    as_json: AS_JSON = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Save an SVG here; - is standard output."
        ),
    ] = None,
) -> None:
    """Draw what patterns select on a made-up prompt, beside the exact attention."""
    check_output(output)
    if not 1 <= tokens <= 32768:
        raise OptionValueError("tokens", tokens, "1 to 32768")
    from mpass.config.pattern_text import parse_pattern
    from mpass.inspection.draw import as_svg, as_text, draw_pattern

    resolution = 24 if output is None else 64
    chosen = [parse_pattern(text) for text in patterns]
    pictures = [draw_pattern(p, num_tokens=tokens, resolution=resolution) for p in chosen]
    deliver(
        lambda: [picture.as_dict() for picture in pictures],
        lambda: (
            "\n\n".join(as_text(picture) for picture in pictures)
            if output is None
            else "\n".join(picture.caption for picture in pictures)
        ),
        output=output,
        as_json=as_json,
        content=lambda: as_svg(pictures),
    )
