"""What to evaluate, and the key of each measurement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpass.config.pattern_text import parse_pattern
from mpass.errors import OptionValueError, nearest
from mpass.evaluate.tasks import TASKS
from mpass.models.load import check_device, parse_dtype
from mpass.models.texts import find_text
from mpass.options import check_inner_backend

PERPLEXITY = "perplexity"
SLIDING = "perplexity_sliding"
"""Windows that overlap: each starts a quarter of its length after the one before, and only its last
quarter is scored, so that every token has at least three quarters of the length before it."""

LOSSES = (PERPLEXITY, SLIDING)
GRID = "needle_grid"
GRID_DEPTHS = 5

DENSE = "dense"
AUTO = "auto"
"""As a pattern: the backend's own choice."""


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    samples: the number of seeds per task and length, and of windows of text for perplexity.
    generate: whether what dense decoding writes after a sparse prefill is scored, too.
    """

    model: str = "smollm2"
    tasks: tuple[str, ...] = ("niah_single_1", "niah_single_2", "passkey", PERPLEXITY)
    lengths: tuple[int, ...] = (4096,)
    patterns: tuple[str, ...] = (AUTO,)
    samples: int = 5
    text: str = "code"
    dtype: str = "bf16"
    device: str = "cpu"
    min_seq_len: int = 0
    inner_backend: str = "eager"
    generate: bool = True


@dataclass(frozen=True)
class Case:
    """One measurement: the key under which a line is found again."""

    model: str
    dtype: str
    text: str
    task: str
    length: int
    seed: int
    pattern: str
    depth: float | None = None


def check_plan(plan: Plan) -> None:
    """Raise the error of whatever is wrong, before anything is loaded or run."""
    for name in ("tasks", "lengths", "patterns"):
        if not getattr(plan, name):
            raise OptionValueError(name, "", "one or more")
    known = [*TASKS, GRID, *LOSSES]
    for task in plan.tasks:
        if task not in known:
            raise OptionValueError("tasks", task + nearest(task, known), ", ".join(known))
    for pattern in plan.patterns:
        if pattern != AUTO:
            parse_pattern(pattern)
    parse_dtype(plan.dtype)
    check_device(plan.device)
    find_text(plan.text)
    check_inner_backend(plan.inner_backend)
    for length in plan.lengths:
        if length < 256:
            raise OptionValueError("lengths", length, "256 tokens and more")
    if plan.samples < 1:
        raise OptionValueError("samples", plan.samples, "an int >= 1")


def list_inputs(plan: Plan) -> Iterator[tuple[str, int, int, float | None]]:
    """(task, length, seed, depth) of every input."""
    for length in plan.lengths:
        for task in plan.tasks:
            for seed in range(plan.samples):
                if task == GRID:
                    for step in range(GRID_DEPTHS):
                        yield task, length, seed, step / (GRID_DEPTHS - 1)
                else:
                    yield task, length, seed, None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of earlier runs; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def case_of(line: dict[str, Any]) -> Case:
    """The key of a saved line."""
    return Case(**{field.name: line[field.name] for field in dataclasses.fields(Case)})
