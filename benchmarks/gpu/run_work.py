"""Do pieces of work one after the other while there is time, each a row of the results."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.gpu.clock import Results
from benchmarks.gpu.setting import Work
from benchmarks.gpu.summary import short

MOST_ERROR = 300
"""Characters of an error that its row keeps."""


def run_work(
    work: Iterable[Work],
    results: Results,
    stop: float,
    seconds_needed: Callable[[str], float] = lambda name: 0.0,
) -> int:
    """Do what is not in the results yet until the time is over; returns how much is left.

    stop: of time.monotonic(); seconds_needed: the most that a piece of this name should take. An
    error is a row: a rival that a build lacks, or a size that does not fit, must not end the run.
    """
    left = 0
    for name, measure in work:
        if name in results.rows:
            continue
        begun = time.monotonic()
        if begun + seconds_needed(name) > stop:
            left += 1
            continue
        try:
            row = measure()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error).strip()}"[:MOST_ERROR]}
        results.add(name, row | {"took_s": round(time.monotonic() - begun, 1)})
        print(f"{name}: {short(results.rows[name])}", flush=True)
        gc.collect()
        if results.on_gpu:
            torch.cuda.empty_cache()
    return left
