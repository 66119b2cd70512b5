"""A small check under compute-sanitizer: accesses outside of memory, and races between threads.

    python -m benchmarks.gpu sanitize --out sanitized.json                  # memcheck and racecheck
    python -m benchmarks.gpu sanitize --out sanitized.json --tools memcheck

Each tool runs one short layer of all kinds of heads in a process of its own, every tensor in memory
of its own, so that an access beyond one is seen. Needs the program compute-sanitizer of CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck")
CHECK = "check/all/bfloat16/64"
SECONDS = 200.0
"""Most time of one tool, which runs kernels some hundred times slower."""

SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
"""The tools' last line; memcheck counts errors, racecheck hazards."""


def main(arguments: Sequence[str]) -> int:
    """Run the tools side by side; 0 if none found anything, 1 if one did, 2 where none is there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu sanitize", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a row per tool, as JSON")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    options = parser.parse_args(arguments)
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        print("benchmarks.gpu sanitize needs compute-sanitizer, which comes with CUDA")
        return 2
    running = {tool: start(program, tool, options.out.parent) for tool in options.tools}
    rows = {}
    for tool, process in running.items():
        try:
            out, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
        rows[tool] = row_of(out, process.returncode)
        print(f"{tool}: {rows[tool]}", flush=True)
    options.out.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["ok"] for row in rows.values()) else 1


def start(program: str, tool: str, folder: Path) -> subprocess.Popen[str]:
    """The check under one tool, in a process of its own."""
    python = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "benchmarks.gpu"]
    check = ["--only", CHECK, "--out", str(folder / f".{tool}.json")]
    return subprocess.Popen(
        [program, "--tool", tool, "--print-limit", "5", *python, *check],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"},
    )


def row_of(out: str, code: int) -> dict[str, Any]:
    """What a tool found. A run that did not come to its summary found nothing out."""
    summary = SUMMARY.search(out)
    if summary is None:
        return {"ok": False, "code": code, "end": out[-600:]}
    found = int(summary[1] or summary[2])
    right = "checks: 1 of 1 right" in out
    row = {"found": found, "right": right, "ok": found == 0 and right}
    return row if row["ok"] else row | {"end": out[-1500:]}
