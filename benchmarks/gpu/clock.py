"""Time on a device, and results that survive being cut off."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
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
        flush.zero_()
        start_event, stop_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        run()
        stop_event.record()
        stop_event.synchronize()
        times.append(start_event.elapsed_time(stop_event))
    return statistics.median(times)


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
