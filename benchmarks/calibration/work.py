"""What is to be measured, and the files in which the stages keep what they have."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import find_text, load_tokens


@dataclass(frozen=True)
class Plan:
    """What to compare.

    dtype: of the rivals' costs, of losses and needles; search_dtype: of the search. length: tokens
    of every text. budgets: shares of dense attention's time at which rivals are tuned; between:
    those at which only a config is searched, to find the faster one of equal quality. search_texts,
    texts: NAME or NAME:FIRST, the token at which the window starts; no window is in both. samples:
    needles per task and length, hidden in needle_text.
    """

    model: str
    dtype: str
    search_dtype: str
    length: int
    budgets: tuple[float, ...]
    between: tuple[float, ...]
    search_texts: tuple[str, ...]
    texts: tuple[str, ...]
    needle_text: str
    samples: int

    @property
    def largest(self) -> float:
        """The budget at which all rivals are run."""
        return max(self.budgets)


@dataclass(frozen=True)
class Work:
    """Where the stages keep what they have: a stage that was stopped goes on where it was."""

    folder: Path

    @property
    def rivals(self) -> Path:
        return self.folder / "rivals.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / "search.state"

    @property
    def search(self) -> Path:
        return self.folder / "search.json"

    @property
    def quality(self) -> Path:
        return self.folder / "quality.jsonl"

    @property
    def needles(self) -> Path:
        return self.folder / "needles.jsonl"

    @property
    def times(self) -> Path:
        return self.folder / "times.jsonl"

    def config(self, name: str, budget: float) -> Path:
        """A searched config; its heatmap has the suffix .svg."""
        return self.folder / f"{name.replace(' ', '_')}-{budget:g}.json"

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note what a stage took, also if it is stopped; peak_gib is that of the process so far."""
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            line = {
                "stage": stage,
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "wall_seconds": round(time.perf_counter() - wall, 1),
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            append(self.times, line)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a measurement to a file of JSON lines, and print it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


@cache
def model_and_tokenizer(name: str, dtype: str) -> tuple[Any, Any]:
    """A model by name or file, loaded once per dtype, and its tokenizer."""
    return load_model(name, dtype=parse_dtype(dtype), device="cpu")


def load_window(spec: str, tokenizer: Any, length: int) -> Any:
    """Tokens [1, length] of a text given as NAME or NAME:FIRST."""
    name, _, first = spec.partition(":")
    return load_tokens(find_text(name).read(), tokenizer, length, skip=int(first or 0))
