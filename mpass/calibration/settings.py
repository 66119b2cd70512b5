"""How a calibration searches: what the user may choose, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpass.errors import OptionValueError

OnProgress = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class Settings:
    """How to search.

    budget: attention time of the whole model, as a share of that of dense attention; or max_loss:
    the most predicted divergence, in nats per token, for which the cheapest choice is taken.
    retrieval_weight: what the divergence at a retrieval answer counts beside that of a text.
    query_blocks: blocks of 64 queries per prompt on which outputs are compared.
    sensitivity_length: texts are cut to this for the runs with one layer sparse, tokens.
    objective: "divergence" (of step 3), "error" (of outputs) or "recall" (of mass); the latter two
    are there to be compared with.
    """

    budget: float | None = 0.25
    max_loss: float | None = None
    retrieval_weight: float = 0.3
    query_blocks: int = 12
    sensitivity_length: int = 1024
    objective: str = "divergence"


def check_settings(settings: Settings) -> None:
    """Raise OptionValueError for numbers that make no search."""
    if (settings.budget is None) == (settings.max_loss is None):
        raise OptionValueError("budget", settings.budget, "given, or max_loss instead of it")
    for name in ("budget", "max_loss"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise OptionValueError(name, value, "a number above 0")
    if settings.objective not in ("divergence", "error", "recall"):
        raise OptionValueError("objective", settings.objective, "divergence, error, recall")
    if not settings.retrieval_weight >= 0:
        raise OptionValueError("retrieval_weight", settings.retrieval_weight, "0 or more")
    if settings.query_blocks < 1:
        raise OptionValueError("query_blocks", settings.query_blocks, "1 or more")
