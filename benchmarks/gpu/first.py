"""The first minutes on a GPU: checks side by side, then timings, the most valuable first.

    python -m benchmarks.gpu first --out rows.json --seconds 440             # checks, then timings
    python -m benchmarks.gpu first --out rows.json --seconds 200 --model     # a model of 8 layers
    python -m benchmarks.gpu first --out rows.json --checks 'check/training .*' --plan 'training/.*'

A GPU that can be had for a quarter of an hour should not be spent on an order that suits nobody.
Rows are written one by one and a call goes on from the file; `PLAN` is the order. Inputs are
planted (inputs.planted_tensors): of random ones nothing is sparse. Clocks and power are logged.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Results
from benchmarks.gpu.run_work import run_work
from benchmarks.gpu.sections import ESTIMATORS, all_work
from benchmarks.gpu.setting import Setting, Work
from benchmarks.gpu.summary import table
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton import LOWERING as lowering

LENGTHS = (131072, 32768, 16384, 8192, 4096, 2048, 1048576)

CHECKS = (
    "check/(plain|window|padding|offset|softcap and sinks|bidirectional|all)/bfloat16/128",
    "check/all/bfloat16/(64|96|80|192|256)",
    "check/(plain|all)/float16/128",
    "check/plain/bfloat16/(64|256)",
    "check/long .*/(8197|70001)",
    "check/training (union|all)/bfloat16/128",
    "check/call .*",
)
"""What is checked first, in processes side by side: all that the defaults use."""

PLAN = (
    "machine/.*",
    "attention/(cudnn|flash|density 0.05|density 1)/131072",
    "layer/(union|union per kv head|vertical slash|block top k)/131072",
    "whole/block top k 0.05/131072",
    "attention/(cudnn|density 1)/(32768|8192)",
    "estimation/union (bf16|int8) of .*/131072",
    "layer/(union|vertical slash)/(32768|8192|4096|2048)",
    "attention/cudnn/(16384|4096|2048)",
    "crossover/never waits/8192",
    "crossover/(4096|8192|12288|16384|32768)",
    "crossover/plain inputs/(8192|16384|32768)",
    "attention/density 0.01/1048576",
    "whole/block top k 0.01/1048576",
    "layer/(union|union per kv head)/1048576",
    "check/long (union|block top k|vertical slash)/1048576",
    "attention/cudnn/1048576",
    "attention/(flex 0.05|flex 128 0.05|density 0.05)/32768",
    "attention/(density 0.2|in-kernel gather)/131072",
    "layer/(block max|block top p|x_attention|sample attention|flex prefill)/131072",
    "capture/(union|vertical slash|block top k)/8192",
    "layer/.*/32768",
    "layer/vertical slash/1048576",
    "attention/densities of union/(32768|8192)",
    "attention/flash/(32768|8192)",
    "crossover/(2048|1024|512|256|128)",
    "training/(union|block top k 0.05|cudnn|flash)/(32768|8192|131072)",
)
"""What is timed, one thing at a time."""

MODEL = ("prefill/(minference|inductor)/(32768|131072)", "prefill/(minference|inductor)/8192")

LAYERS = 8
"""Layers of the model: the whole one takes a minute longer to compile."""

CHECK_SECONDS = 120.0
"""Most time for the checks, compilation included."""


def main(arguments: Sequence[str]) -> int:
    """Checks, then timings, until the time is over; 0 if every check passed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu first", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="rows to write and go on from")
    parser.add_argument("--seconds", type=float, default=440, help="end before this is over")
    parser.add_argument("--model", action="store_true", help=f"a model of {LAYERS} layers instead")
    parser.add_argument(
        "--plan", nargs="*", help="names of timings instead of the plan's, in order"
    )
    parser.add_argument(
        "--checks",
        nargs="*",
        help="names of checks instead of the usual ones; nothing else is built",
    )
    parser.add_argument("--workers", type=int, default=10, help="processes of the checks; 0: none")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # i/n: a worker, its part of the checks
    parser.add_argument("--smoke", action="store_true", help="dry run on the CPU")
    options = parser.parse_args(arguments)
    stop = time.monotonic() + options.seconds
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks.gpu first needs a GPU that torch can use; --smoke dry-runs it on the CPU")
        return 2
    device = torch.device("cpu" if options.smoke else "cuda")
    lengths = (130,) if options.smoke else LENGTHS
    setting = Setting(device, options.smoke, lengths, planted=True)
    if options.share:
        work_on_share(setting, options.out, options.share, options.checks)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, device, smoke=options.smoke)
    clocks = log_clocks(options.out.with_suffix(".clocks.csv"))
    try:
        if options.workers and not options.model:
            run_checks(results, options.workers, options.smoke, options.checks)
        plan = options.plan if options.plan is not None else MODEL if options.model else PLAN
        if options.model:
            setting = replace(setting, layers=LAYERS)
        run_work(chosen(setting, plan), results, stop)
    finally:
        if clocks is not None:
            clocks.terminate()
    print(table(results.rows, ""), f"\n{results.about}")
    checks = [row for name, row in results.rows.items() if name.startswith("check/")]
    return 0 if all(row.get("ok") for row in checks) else 1


def chosen(setting: Setting, plan: Iterable[str]) -> list[Work]:
    """The pieces of work whose names the patterns match, in their order, each once."""
    work = dict(all_work(setting))
    if setting.smoke:
        plan = [re.sub(r"/(\d|\()[\d|)]*$", "/130", pattern) for pattern in plan]
    names = [name for pattern in plan for name in work if re.fullmatch(pattern, name)]
    return [(name, work[name]) for name in dict.fromkeys(names)]


def run_checks(
    results: Results, workers: int, smoke: bool, checks: Sequence[str] | None = None
) -> None:
    """All checks, or those named, in processes of their own, and their rows into the results.

    The processes also build the kernels of the timings, so that none of these waits for one.
    """
    wanted = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "benchmarks.gpu"]
    with tempfile.TemporaryDirectory() as folder:
        parts = [Path(folder) / f"{i}.json" for i in range(workers)]
        running = [
            subprocess.Popen(
                [*wanted, "first", "--out", str(part), "--share", f"{i}/{workers}"]
                + (["--smoke"] if smoke else [])
                + ([] if checks is None else ["--checks", *checks]),
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for i, part in enumerate(parts)
        ]
        end = time.monotonic() + CHECK_SECONDS
        for process in running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for part in parts:
            rows: dict[str, Any] = json.loads(part.read_text())["rows"] if part.is_file() else {}
            for name, row in rows.items():
                results.add(name, row)
    found = {name: row for name, row in results.rows.items() if name.startswith("check/")}
    right = sum(bool(row.get("ok")) for row in found.values())
    print(f"checks: {right} of {len(found)} right", flush=True)


def work_on_share(
    setting: Setting, out: Path, share: str, checks: Sequence[str] | None = None
) -> None:
    """A worker's part: every n-th check, then every n-th of the timed layers, unmeasured.

    checks: names of the only checks that are wanted; then no layers are built.
    """
    place, count = (int(part) for part in share.split("/"))
    results = Results(out, setting.device, smoke=setting.smoke)
    usual = ("check/long block top k/.*",) if setting.smoke else CHECKS
    wanted = usual if checks is None else checks
    run_work(chosen(setting, wanted)[place::count], results, float("inf"))
    if checks is not None:
        return
    lengths = [length for length in setting.lengths if length <= 131072]
    pairs = [] if setting.smoke else [(length, name) for length in lengths for name in ESTIMATORS]
    for length, name in pairs[place::count]:
        query, key, value = setting.tensors(length)
        try:
            inputs = AttentionInputs(query, key, value, AttentionMask(), query.shape[-1] ** -0.5)
            lowering.sparse_attention(inputs, ESTIMATORS[name](query, key))
        except Exception as error:
            print(f"{name}/{length}: {error}", flush=True)  # its row will tell


def log_clocks(path: Path) -> subprocess.Popen[bytes] | None:
    """Clocks, power and heat every second in a file, where nvidia-smi is there to tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    fields = "timestamp,name,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    with path.open("ab") as file:
        return subprocess.Popen(
            [program, f"--query-gpu={fields}", "--format=csv,noheader", "-l", "1"], stdout=file
        )
