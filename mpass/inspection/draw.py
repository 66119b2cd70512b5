"""Pictures of patterns: what one selects on a made-up prompt, beside the exact attention.

The same maps as on the page (mpass.inspection.recall), as SVG for documents or as characters for a
terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpass.functional import estimate_index
from mpass.inspection.recall import LEVELS, measure_recall
from mpass.lowering.density import density as count_density
from mpass.lowering.index import BLOCK, AttentionMask
from mpass.lowering.recorder import Operands
from mpass.patterns.base import Pattern

HEAD_DIM = 64
SIDE = 320
"""Width and height of one map in an SVG, in its units."""

COLOR = "#2f6fb5"
"""Of full cells; others are more transparent, so that a picture fits light and dark pages."""

SHADES = " ·░▒▓█"


@dataclass(frozen=True, eq=False)
class Picture:
    """What a pattern does on one head of the made-up prompt.

    computed, exact: uint8 [R, R], see mpass.inspection.recall.Recall; density, recall: as of a
    profile.
    """

    pattern: Pattern
    num_tokens: int
    density: float
    recall: float
    computed: Tensor
    exact: Tensor

    @property
    def caption(self) -> str:
        """`a_shape(128, 1024) at 4096 tokens: density 31.2%, recall 94.0%`."""
        return (
            f"{self.pattern} at {self.num_tokens} tokens: "
            f"density {self.density:.1%}, recall {self.recall:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON: maps as rows of levels."""
        return {
            "pattern": str(self.pattern),
            "num_tokens": self.num_tokens,
            "density": self.density,
            "recall": self.recall,
            "computed": self.computed.tolist(),
            "exact": self.exact.tolist(),
        }


def draw_pattern(
    pattern: Pattern, *, num_tokens: int = 4096, resolution: int = 64, seed: int = 0
) -> Picture:
    """Run a pattern on `made_up_prompt` and compare it with the exact attention."""
    query, key = made_up_prompt(num_tokens, seed)
    mask, scale = AttentionMask(), HEAD_DIM**-0.5
    index = estimate_index(query, key, mask, pattern, scale)
    operands = Operands(query, key, index, mask, scale, 0.0, None)
    recall = measure_recall(operands, max_query_blocks=num_tokens, resolution=resolution)
    share = count_density(index, mask, batch=1, num_queries=num_tokens, num_keys=num_tokens)
    return Picture(
        pattern=pattern,
        num_tokens=num_tokens,
        density=float(share[0, 0]),
        recall=float(recall.recall[0]),
        computed=recall.computed[0],
        exact=recall.exact[0],
    )


def made_up_prompt(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Query and key [1, 1, N, D] whose attention has what real heads have.

    Sinks at the first keys, a few keys that everyone looks at, a local band, one far diagonal, and
    a stretch of the prompt that looks back at an earlier one.
    """
    generator = torch.Generator().manual_seed(seed)
    quarter = HEAD_DIM // 4
    positions = torch.arange(num_tokens, dtype=torch.float32)

    def noise(width: int) -> Tensor:
        return torch.randn(num_tokens, width, generator=generator)

    # Rotations by position: their product depends on the distance alone and falls off with it.
    angles = positions[:, None] * (2.0 ** -torch.linspace(3, 12, quarter))
    turns = torch.cat([angles.cos(), angles.sin()], dim=-1) * 2.2
    far = (positions - num_tokens // 3)[:, None] * (2.0 ** -torch.linspace(2, 8, quarter // 2))
    near = positions[:, None] * (2.0 ** -torch.linspace(2, 8, quarter // 2))
    everyone = torch.zeros(num_tokens, quarter)
    everyone[:4] = 5.0
    everyone[torch.randint(num_tokens, (8,), generator=generator)] = 4.0
    topic = torch.zeros(num_tokens)
    topic[num_tokens // 2 : num_tokens * 5 // 8] = 1.0
    asks = torch.zeros(num_tokens)
    asks[num_tokens * 3 // 4 : num_tokens * 7 // 8] = 1.0
    slash = 1.8
    query = torch.cat(
        [turns, torch.cat([far.cos(), far.sin()], -1) * slash, 1.0 + 0.3 * noise(quarter)], dim=-1
    )
    key = torch.cat(
        [turns, torch.cat([near.cos(), near.sin()], -1) * slash, everyone + 0.5 * noise(quarter)],
        dim=-1,
    )
    query[:, -1] += 5.0 * asks
    key[:, -1] += 5.0 * topic
    return query[None, None], key[None, None]


def as_svg(pictures: Sequence[Picture]) -> str:
    """An SVG with a row per picture: what is computed, and the exact attention."""
    height = SIDE + 50
    width = 2 * SIDE + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(pictures)}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{COLOR}">'
    ]
    for row, picture in enumerate(pictures):
        top = row * height
        parts.append(f'<text x="0" y="{top + 15}">{picture.caption}</text>')
        parts += svg_map(picture.computed, 0, top + 22, "what it computes")
        parts += svg_map(picture.exact, SIDE + 30, top + 22, "exact attention, log scale")
    return "\n".join([*parts, "</svg>", ""])


def svg_map(levels: Tensor, left: int, top: int, caption: str) -> list[str]:
    """One map: a path per level, of a line per run of cells, as thick as a cell is high.

    A cell is one unit of the map's group.
    """
    rows = levels.tolist()
    lines: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        for level, run in groupby(row):
            count = len(list(run))
            if level:
                lines.setdefault(level, []).append(f"M{x} {y}h{count}")
            x += count
    return [
        f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="{COLOR}"/>',
        f'<g transform="translate({left} {top}) scale({SIDE / len(rows):g}) translate(0 .5)" '
        f'stroke="{COLOR}" shape-rendering="crispEdges">',
        *(
            f'<path stroke-opacity="{level / LEVELS:.2g}" d="{"".join(own)}"/>'
            for level, own in sorted(lines.items())
        ),
        "</g>",
        f'<text x="{left}" y="{top + SIDE + 15}">{caption}</text>',
    ]


def as_text(picture: Picture) -> str:
    """Both maps as characters, side by side, with the caption above."""
    lines = [picture.caption, "what it computes | exact attention, log scale"]
    for left, right in zip(picture.computed.tolist(), picture.exact.tolist(), strict=True):
        lines.append(f"{shade(left)} | {shade(right)}")
    return "\n".join(lines)


def shade(levels: Sequence[int]) -> str:
    """A row of a map, two characters per cell."""
    return "".join(SHADES[-(-level * (len(SHADES) - 1) // LEVELS)] * 2 for level in levels)


def draw_main(pattern: Pattern) -> None:
    """What a pattern's file does when it is run: print the picture, or write the SVG it is told."""
    if len(sys.argv) > 1:
        picture = draw_pattern(pattern)
        Path(sys.argv[1]).write_text(as_svg([picture]), encoding="utf-8")
    else:
        print(as_text(draw_pattern(pattern, num_tokens=24 * BLOCK, resolution=24)))
