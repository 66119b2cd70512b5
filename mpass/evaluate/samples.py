"""From a task's texts to tokens of an exact length, with the answer inside.

The answer stands in the prompt, after the question, so that the sparse prefill itself has to know
it: the score asks whether each of its tokens is the most likely one given those before it. Letting
dense decode steps write the answer instead hides what a sparse prefill lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.errors import OptionValueError
from mpass.models.texts import start_tokens


@dataclass(frozen=True)
class Puzzle:
    """A retrieval task before it has a length.

    head: text before the haystack; filler: given a seed-fixed start, yields units of haystack
    without end; inserts: (depth from 0 to 1, text) put between two units; tail: the question, up to
    where the answer starts; answers: what is to be found, in the order in which it is asked for;
    separator: stands before every unit and insert.
    """

    head: str
    filler: Callable[[], Iterator[str]]
    inserts: tuple[tuple[float, str], ...]
    tail: str
    answers: tuple[str, ...]
    separator: str = " "


@dataclass(frozen=True, eq=False)
class Sample:
    """A puzzle at a length.

    tokens: int64 [1, N], prompt and answers; spans: [start, stop) of each answer's tokens; prompt:
    how many tokens stand before what is asked for, all if nothing is.
    """

    tokens: Tensor
    answers: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    prompt: int


def fit(puzzle: Puzzle, tokenizer: Any, length: int) -> Sample:
    """Fill the haystack so that prompt and answer have exactly `length` tokens.

    They begin with the tokenizer's start token if it puts one. Where a unit does not fit whole, the
    first one loses its beginning. Raises OptionValueError if the task without haystack
    is longer than `length`.
    """
    head = start_tokens(tokenizer) + encode(tokenizer, puzzle.head)
    tail = encode(tokenizer, puzzle.tail)
    inserts = [
        (depth, encode(tokenizer, puzzle.separator + text)) for depth, text in puzzle.inserts
    ]
    answer, spans = encode_answers(tokenizer, puzzle.answers)
    fixed = len(head) + len(tail) + len(answer) + sum(len(ids) for _, ids in inserts)
    if fixed > length:
        raise OptionValueError("length", length, f"at least {fixed} tokens for this task")

    units = haystack_units(puzzle, tokenizer, length - fixed)
    # From the deepest to the shallowest, so that an insert does not move the places of others, and
    # those of one depth from the last to the first, so that they keep their order.
    count = len(units)
    for depth, ids in reversed(sorted(inserts, key=lambda insert: insert[0])):
        units.insert(round(depth * count), ids)
    prompt = head + [token for unit in units for token in unit] + tail
    tokens = torch.tensor([prompt + answer])
    assert tokens.shape[1] == length
    shift = len(prompt)
    placed = tuple((shift + start, shift + stop) for start, stop in spans)
    return Sample(tokens, puzzle.answers, placed, shift)


def haystack_units(puzzle: Puzzle, tokenizer: Any, room: int) -> list[list[int]]:
    """Tokens of as many units as fill `room` exactly; the first is cut at its beginning."""
    units: list[list[int]] = []
    total, filler = 0, puzzle.filler()
    while total < room:
        texts = [puzzle.separator + next(filler) for _ in range(64)]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if total < room:
                units.append(ids)
                total += len(ids)
    excess = total - room
    while excess > 0:
        cut = min(excess, len(units[0]))
        units[0] = units[0][cut:]
        excess -= cut
        if not units[0]:
            units.pop(0)
    return units


def encode_answers(
    tokenizer: Any, answers: tuple[str, ...]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of ` a, b, c` and the span of each answer.

    A space before an answer is part of it only where the tokenizer joins the two: a model that goes
    on with a colon, and then knows each digit, has found the answer.
    """
    space = encode(tokenizer, " ")
    tokens: list[int] = []
    spans = []
    for answer in answers:
        if tokens:
            tokens += encode(tokenizer, ",")
        own = encode(tokenizer, f" {answer}")
        apart = len(space) if own[: len(space)] == space else 0
        spans.append((len(tokens) + apart, len(tokens) + len(own)))
        tokens += own
    return tokens, spans


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, none added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
