"""What a first prompt waits for: `backend="minference"` beside Inductor, with cold and warm caches.

    python benchmarks/first_compile.py --length 2048 --json benchmarks/results/first_compile.json

Each backend compiles a packaged model in a process of its own whose caches (Inductor's and our
constants) are empty, then in a second one that finds what the first has left. Seconds of wall from
the call to the hidden states, less those of a second prefill; CPU seconds of the process and of the
compilers that it starts, less the same. Interleaved; on a machine that does other work only CPU
seconds mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def compile_once(backend: str, model_name: str, length: int) -> dict[str, float]:
    """Seconds of a first prefill over those of a second one."""
    from mpass.models.load import load_model
    from mpass.models.prefill import compile_body, prefill

    model, _ = load_model(model_name, dtype=torch.bfloat16)
    tokens = torch.randint(0, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    forward = compile_body(model, backend)

    def run() -> tuple[float, float]:
        cpu, wall = cpu_seconds(), time.perf_counter()
        prefill(forward, tokens)
        return cpu_seconds() - cpu, time.perf_counter() - wall

    first, second = run(), run()
    return {"cpu": first[0] - second[0], "wall": first[1] - second[1], "prefill": second[1]}


def cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def in_process(backend: str, settings: argparse.Namespace, folder: str) -> dict[str, float]:
    """`compile_once` in a process whose caches are in a folder."""
    command = [sys.executable, __file__, "--backend", backend]
    command += ["--model", settings.model, "--length", str(settings.length)]
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "MPASS_PROGRESS": "0",
    }
    if settings.serial:  # compilers are children of the process, then, and not of its workers
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--serial", action="store_true", help="one compiler at a time")
    parser.add_argument("--backend", choices=["inductor", "minference"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    settings = parser.parse_args()
    if settings.backend:
        print(json.dumps(compile_once(settings.backend, settings.model, settings.length)))
        return
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(settings.repeats):
        for backend in ("inductor", "minference"):
            with tempfile.TemporaryDirectory() as folder:
                for caches in ("cold", "warm"):
                    found = in_process(backend, settings, folder)
                    runs.setdefault(f"{backend}, {caches}", []).append(found)
                    print(f"{backend}, {caches}: {found}", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, found_runs in runs.items():
        figures[name] = {
            key: statistics.median(one[key] for one in found_runs) for key in found_runs[0]
        }
        print(f"{name:18} wall {figures[name]['wall']:6.1f} s, CPU {figures[name]['cpu']:6.1f} s")
    if settings.json:
        settings.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
