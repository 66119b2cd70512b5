"""What a worker of one system speaks: a line of JSON in, a line of JSON out.

It imports nothing but the standard library, since each system has a Python of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class System(Protocol):
    """One system with a model loaded. Tokens are ids of the model's own vocabulary."""

    version: str

    def first_token(self, tokens: Sequence[int]) -> int:
        """Prefill a prompt, nothing of which is cached, and return the likeliest next token."""
        ...

    def continue_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        """The tokens that greedy decoding adds to a prompt."""
        ...

    def loss(self, tokens: Sequence[int]) -> float | None:
        """Nats per token of a text whose prefill is as in `first_token`; None where not told."""
        ...


def serve(make: Callable[[], System]) -> None:
    """Answer requests until the input ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    system = make()
    answer({"version": system.version})
    for line in sys.stdin:
        request = json.loads(line)
        tokens = request["tokens"]
        if request["do"] == "prefill":
            wall, cpu = time.perf_counter(), time.process_time()
            token = system.first_token(tokens)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            answer({"token": token, "cpu": cpu, "wall": wall})
        elif request["do"] == "continue":
            answer({"tokens": system.continue_tokens(tokens, request["count"])})
        else:
            answer({"loss": system.loss(tokens)})
