"""Check and measure the Triton kernels on this machine's GPU.

    python -m benchmarks.gpu                    # ten minutes; call again to go on
    python -m benchmarks.gpu --only check       # correctness alone
    python -m benchmarks.gpu first --out FILE   # eight minutes, most valuable first: first.py
    python -m benchmarks.gpu sanitize --out FILE  # memory and races of a small check: sanitize.py
    python -m benchmarks.gpu --smoke            # dry run, interpreted on a CPU, tiny sizes

Needs no network. Writes every row to a JSON file as it is measured and prints a table last.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu import first, sanitize
from benchmarks.gpu.clock import Results
from benchmarks.gpu.run_work import run_work
from benchmarks.gpu.sections import all_work
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.summary import table

LENGTHS = tuple(1024 * 2**i for i in (0, 2, 3, 4, 5, 6, 7, 8, 9, 10))
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run what is not measured yet; 0 if every check passed, 1 if one failed, 2 without a GPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["first"]:
        return first.main(arguments[1:])
    if arguments[:1] == ["sanitize"]:
        return sanitize.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--only", default="", help="names that contain this: check, attention/, ..."
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="end before this is over")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write and go on from")
    parser.add_argument(
        "--smoke", action="store_true", help="dry run on the CPU; times mean nothing"
    )
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks.gpu needs a GPU that torch can use; --smoke dry-runs it on the CPU")
        return 2
    if importlib.util.find_spec("triton") is None:
        print("benchmarks.gpu needs triton: pip install triton")
        return 2
    device = torch.device("cpu" if options.smoke else "cuda")
    lengths = (130,) if options.smoke else tuple(options.lengths)
    out = options.out or RESULTS / ("smoke.json" if options.smoke else "gpu.json")
    results = Results(out, device, smoke=options.smoke)
    work = (
        piece
        for piece in all_work(Setting(device, options.smoke, lengths))
        if options.only in piece[0]
    )
    left = run_work(work, results, time.monotonic() + 60 * options.minutes, seconds_needed)
    print(table(results.rows, options.only))
    print(f"{results.about}\n{out}" + (f"\n{left} left: call again to go on" if left else ""))
    failed = [name for name, row in results.rows.items() if "error" in row and not row.get("ok")]
    return 1 if any(name.startswith("check/") for name in failed) else 0


def seconds_needed(name: str) -> float:
    """Most time that a piece of work should take; a prefill builds and compiles a whole model."""
    if name.startswith("prefill/"):
        return 240.0
    end = name.rsplit("/", 1)[1]
    length = int(end) if end.isdigit() else 0
    return 30.0 if length < 2**19 else 60.0 if length < 2**20 else 120.0


if __name__ == "__main__":
    sys.exit(main())
