"""Which steps of a sampler are whole, for all attentions alike or for each its own.

A `Schedule` is the same for every attention. A `DenoisingPlan` has spans of steps for each of them,
as `mpass.search_denoising` finds them (mpass/calibration/denoising.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mpass.errors import ArgumentError, ConfigFileError
from mpass.files import write_whole

Keep = Literal["residual", "output", "nothing"]
"""What is kept of a whole step; "output" and "nothing" are there to compare with."""

FORMAT = "mpass-denoising-plan"
"""What the files of plans begin with."""


@dataclass(frozen=True, slots=True)
class StepRule:
    """What one attention does at one step.

    full: whether it is whole. kept: whether a whole step is needed by one that is not: by the next,
    or to tell a slope. keep, order, ratio, decay: as of `denoising`.
    """

    full: bool
    kept: bool
    keep: Keep
    order: int = 0
    ratio: bool = False
    decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps are whole, and what the others make of the last whole one; see `denoising`."""

    steps: int
    full: int
    every: int
    keep: Keep = "residual"
    order: int = 0
    ratio: bool = False
    decay: float = 0.04

    def __post_init__(self) -> None:
        numbers = (("steps", self.steps, 1), ("full", self.full, 1), ("every", self.every, 1))
        for name, value, least in numbers:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(name, value, f"an int >= {least}")
        if self.keep not in get_args(Keep):
            raise ArgumentError("keep", self.keep, ", ".join(get_args(Keep)))
        if isinstance(self.order, bool) or self.order not in (0, 1):
            raise ArgumentError("order", self.order, "0 or 1")
        if not isinstance(self.ratio, bool):
            raise ArgumentError("ratio", self.ratio, "True or False")
        if self.ratio and (self.keep != "residual" or self.order):
            raise ArgumentError("ratio", self.ratio, 'False, or with keep="residual" and order=0')
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise ArgumentError("decay", self.decay, "a number")

    def is_full(self, step: int) -> bool:
        """Whether attention is whole at a step: at the first ones, and then every few."""
        later = step - self.full + 1
        return step >= self.steps or later <= 0 or later % self.every == 0

    def is_kept(self, step: int) -> bool:
        """Whether a whole step is needed by one that is not: by the next, or to tell a slope."""
        if self.keep == "nothing" or not self.is_full(step):
            return False
        following = next((s for s in range(step + 1, self.steps) if self.is_full(s)), self.steps)
        after = following + 1 if self.order else step + 1
        return following > step + 1 or (after < self.steps and not self.is_full(after))

    def at(self, step: int, place: int) -> StepRule:
        """What any attention does at a step."""
        return StepRule(
            full=self.is_full(step),
            kept=self.is_kept(step),
            keep=self.keep,
            order=self.order,
            ratio=self.ratio,
            decay=self.decay,
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Steps from `start` to before `stop`: whole at the first, and then at each so-manieth.

    keep: what the steps between take from the last whole one.
    """

    start: int
    stop: int
    every: int
    keep: Keep = "residual"

    def __post_init__(self) -> None:
        for name, value, least in (("start", self.start, 0), ("every", self.every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(name, value, f"an int >= {least}")
        if isinstance(self.stop, bool) or not isinstance(self.stop, int) or self.stop <= self.start:
            raise ArgumentError("stop", self.stop, f"an int > {self.start}")
        if self.keep not in ("residual", "output"):
            raise ArgumentError("keep", self.keep, "residual, output")

    def is_full(self, step: int) -> bool:
        """Whether attention is whole at a step of the span."""
        return (step - self.start) % self.every == 0


@dataclass(frozen=True)
class DenoisingPlan:
    """Spans of steps for each attention of a model: `mpass.denoising(steps, plan=...)`.

    steps: of the sampler. attentions: the spans of each, without gaps from the first step to the
    last, in the order in which attentions first run in a step; of guidance as two calls those of
    the second call follow.

    Raises ArgumentError for spans with gaps.
    """

    steps: int
    attentions: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        for place, spans in enumerate(self.attentions):
            starts = [0, *(span.stop for span in spans)]
            if [span.start for span in spans] != starts[:-1] or starts[-1] != self.steps:
                told = [(span.start, span.stop) for span in spans]
                allowed = f"spans that follow one another from step 0 to {self.steps}"
                raise ArgumentError(f"attentions[{place}]", told, allowed)

    def at(self, step: int, place: int) -> StepRule:
        """What an attention does at a step. Raises ArgumentError if the plan has too few."""
        if place >= len(self.attentions):
            number = len(self.attentions)
            raise ArgumentError(
                "plan", f"of {number} attentions", "a plan that was searched for this very model"
            )
        span = next((s for s in self.attentions[place] if s.start <= step < s.stop), None)
        if span is None or span.is_full(step):
            follows = span is not None and step + 1 < span.stop and span.every > 1
            return StepRule(True, follows, "residual" if span is None else span.keep)
        return StepRule(False, False, span.keep)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a file, as JSON."""
        spans = [[asdict(span) for span in own] for own in self.attentions]
        content = {"format": FORMAT, "version": 1, "steps": self.steps, "attentions": spans}
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DenoisingPlan:
        """The plan of a file. Raises ConfigFileError if it holds none."""
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigFileError(path, [("$", str(error))]) from None
        known = isinstance(content, dict) and content.get("format") == FORMAT
        if not known or content.get("version") != 1:
            raise ConfigFileError(path, [("$", f"it is no {FORMAT} of version 1")])
        try:
            spans = tuple(tuple(Span(**span) for span in own) for own in content["attentions"])
            return cls(content["steps"], spans)
        except (KeyError, TypeError, ArgumentError) as error:
            raise ConfigFileError(path, [("$.attentions", str(error))]) from None
