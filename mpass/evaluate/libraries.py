"""The record of libraries beside transformers: small programs of each, as eager and how sparse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpass.evaluate.classes import SECONDS, ClassRecord, CountAttentions, counts_of, limit, seeded
from mpass.evaluate.coverage import largest_difference, run_compiled
from mpass.models.libraries import Library
from mpass.models.tiny import main_output

KIND = "library"


class ByPosition(nn.Module):
    """A module whose inputs are a tuple and a dict, and whose first output counts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> tuple[Tensor]:
        """The first output of the module."""
        return (first(self.inner(*inputs, **keywords)),)


def first(output: Any) -> Tensor:
    """The tensor that a module gives, or the first of those that it gives."""
    result: Tensor = output if isinstance(output, Tensor) else output[0]
    return result


def cover_libraries(libraries: Iterable[Library]) -> Iterator[ClassRecord]:
    """Records of the programs of libraries, one by one; a library that is not here has one record.

    The scenario of a record is the name of the program.
    """
    for library in libraries:
        for name in library.programs:
            record = cover_program(library, name)
            yield record
            if record.not_run.startswith("ModuleNotFoundError"):
                break


def cover_program(library: Library, name: str) -> ClassRecord:
    """Run one program of a library, eagerly and through the pass."""
    started = time.perf_counter()
    record = ClassRecord(KIND, library.name, library.module, name)
    try:
        with seeded():
            torch.manual_seed(0)
            program = library.programs[name]()
            module = program.module.eval().requires_grad_(False)
            call = dict(program.keywords)
            with CountAttentions(program.length, program.length) as counted:
                expected = main_output(ByPosition(module)(program.inputs, call))
    except Exception as error:
        text = " ".join(str(error).split())
        return dataclasses.replace(record, not_run=f"{type(error).__name__}: {text}"[:200])
    record = dataclasses.replace(record, attentions=counted.count)
    try:
        with seeded(), limit(SECONDS):
            run = run_compiled(ByPosition(module), {"inputs": program.inputs, "keywords": call})
    except Exception as error:  # recorded, so that one program does not hide the others
        return dataclasses.replace(record, error=f"{type(error).__name__}: {error}"[:500])
    return dataclasses.replace(
        record,
        **counts_of(run, counted.count),
        difference=largest_difference(run.output, expected, None),
        seconds=round(time.perf_counter() - started, 2),
    )
