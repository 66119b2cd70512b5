"""`options={"max_loss": 0.01}`: how much a model may lose, in nats per token, as a pattern.

Sparse attention moves a model's predictions away from those of dense attention; the divergence of
the two, in nats per token, is the loss to expect, which the loss on a single text scatters around.
How it grows with `row_share` of the pattern union was read off benchmarks/results (frontier.jsonl
and quality_signals.jsonl) and held against texts that had not been seen (docs/accuracy.md). Models
differ: what is promised here was measured on the packaged ones, and `options={"measure": True}`
tells what attention a prompt really lost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mpass.patterns.base import Pattern
from mpass.patterns.union import VerticalBlock

LEAST, MOST = 0.001, 0.1
"""The losses that may be asked for; nats per token."""

AT_LENGTH = 8192
"""The prompts that SHARE is of; `VerticalBlock.at` says what it is at other lengths."""

SHARE = 0.0125
"""`row_share` at which a prompt of AT_LENGTH tokens is expected to lose 0.01 at most."""

POWER, SMALL_POWER = 0.8, 1.0
"""How fast `row_share` may grow with the loss, and how fast it must fall below 0.01: divergence
goes with its 1.25th power where much is lost, and with its first where little is."""

LEFT_OUT = 0.2
"""Where the estimate says that more of a query block's attention is left out than this, blocks are
kept until it is not: attention that is spread evenly has no block above any share. It is that of a
loss of 0.01 and goes with its root, up to the default pattern's."""

MOST_OVER = 2.0
"""A call runs dense where rows that were looked at lose so many times LEFT_OUT of a head's
attention: what the estimate said was wrong then. No head of the texts that were measured did."""


def left_out(max_loss: float) -> float:
    """The share of a query block's attention that may be left out by the estimate."""
    return min(1 - VerticalBlock().mass, LEFT_OUT * (max_loss / 0.01) ** 0.5)


def most_lost(max_loss: float) -> float:
    """The share of a head's attention that a call may lose before it runs dense."""
    return round(min(1.0, MOST_OVER * left_out(max_loss)), 4)


@functools.lru_cache(maxsize=64)
def pattern_for_loss(max_loss: float) -> VerticalBlock:
    """What a head keeps so that its model is expected to lose at most `max_loss`, LEAST to MOST.

    It keeps more the less may be lost.
    """
    power = SMALL_POWER if max_loss < 0.01 else POWER
    return VerticalBlock(
        mass=round(1 - left_out(max_loss), 4),
        row_share=round(SHARE * (max_loss / 0.01) ** power, 6),
        at_length=AT_LENGTH,
    )


def promised_share(patterns: Sequence[Pattern], max_loss: float | None) -> float:
    """`most_lost` of a layer whose heads all keep what is promised, else 1.

    What a user has named for a head may lose what it loses, and says nothing of its layer.
    """
    if max_loss is None or set(patterns) != {pattern_for_loss(max_loss)}:
        return 1.0
    return most_lost(max_loss)
