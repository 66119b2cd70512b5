"""Config files as MInference publishes them, made up."""

from __future__ import annotations

import random

ENTRIES = (
    ["vertical_and_slash", 1000, 6096, 336],
    ["vertical_and_slash", 30, 800, 0.9623493552207947],
    ["vertical_and_slash", 3500, 100, 0.125],
    ["stream_llm", 100, 800, 0.5],
    ["block_sparse", 1000, 1, 0.25],
)


def per_head(layers: int, heads: int) -> list[dict[str, list]]:
    """A file as MInference publishes them."""
    draw = random.Random(0)
    return [{str(h): list(draw.choice(ENTRIES)) for h in range(heads)} for _ in range(layers)]
