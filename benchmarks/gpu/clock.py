"""Time on a device, and results that survive being cut off."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20
"""Written before each run, so that no run finds its inputs in the L2 cache."""


def milliseconds(
    run: Callable[[], Any],
    device: torch.device,
    *,
    budget: float = 0.5,
    most: int = 20,
    warm_up: bool = True,
) -> float:
    """Median time of `run` after one warm-up: as many runs as fit `budget` seconds, 1 to `most`."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    if warm_up:
        run()
    times: list[float] = []
    while not times or (sum(times) / 1e3 < budget and len(times) < most):
        times.append(one_run(run, flush))
    return statistics.median(times)


def one_run(run: Callable[[], Any], flush: torch.Tensor) -> float:
    """Milliseconds between events around a run that finds nothing in the cache."""
    flush.zero_()
    start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    stop_event.record()
    stop_event.synchronize()
    return start_event.elapsed_time(stop_event)


def milliseconds_in_turns(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    budget: float = 1.5,
    most: int = 40,
    warm_ups: int = 3,
) -> dict[str, float]:
    """Median time of each run; they take turns, so that what changes meanwhile meets all alike.

    As many rounds as fit `budget` seconds, 1 to `most`, after some that warm up.
    """
    if device.type != "cuda":
        return {name: milliseconds(run, device) for name, run in runs.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warm_ups):
        for run in runs.values():
            run()
    torch.cuda.synchronize()
    begun, rounds = time.perf_counter(), 0
    while rounds == 0 or (time.perf_counter() - begun < budget and rounds < most):
        for name, run in runs.items():
            times[name].append(one_run(run, flush))
        rounds += 1
    return {name: statistics.median(found) for name, found in times.items()}


class Results:
    """Rows of results by name in a JSON file, written after each: a second call goes on from there.

    A file of another device, version or mode is not continued but replaced.
    """

    def __init__(self, path: Path, device: torch.device, *, smoke: bool) -> None:
        self.path = path
        self.on_gpu = device.type == "cuda"
        self.about = describe(device, smoke=smoke)
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            old = json.loads(path.read_text())
            if old["about"] == self.about:
                self.rows = old["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, and the file whole at any time."""
        self.rows[name] = row | {
            "date": datetime.datetime.now(datetime.UTC).isoformat("T", "minutes")
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps({"about": self.about, "rows": self.rows}, indent=1))
        os.replace(aside, self.path)


def describe(device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """What the figures depend on."""
    import triton

    import mpass

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "smoke": smoke,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "mpass": getattr(mpass, "__version__", "0"),
    }
