"""`mpass draw`: pictures of patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpass.cli.prompt import check_output
from mpass.errors import OptionValueError


def draw(
    patterns: Annotated[
        list[str], typer.Argument(help="NAME or 'NAME(1000, 512)'; see `mpass patterns`.")
    ],
    tokens: Annotated[int, typer.Option(help="Tokens of the made-up prompt.")] = 4096,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write an SVG instead of characters.")
    ] = None,
) -> None:
    """Draw what patterns select on a made-up prompt, beside the exact attention."""
    check_output(output)
    if not 1 <= tokens <= 32768:
        raise OptionValueError("tokens", tokens, "1 to 32768")
    from mpass.config.pattern_text import parse_pattern
    from mpass.files import write_whole
    from mpass.inspection.draw import as_svg, as_text, draw_pattern

    resolution = 24 if output is None else 64
    chosen = [parse_pattern(text) for text in patterns]
    pictures = [draw_pattern(p, num_tokens=tokens, resolution=resolution) for p in chosen]
    if output is None:
        typer.echo("\n\n".join(as_text(picture) for picture in pictures))
    else:
        write_whole(output, as_svg(pictures))
        typer.echo(f"Saved to {output}")
