"""One prompt in several systems, interleaved: CPU seconds and wall, greedy tokens and loss.

    make peers                      # a Python for each system; llama.cpp is built from source
    python -m benchmarks.peers --lengths 2048,4096,8192 --json benchmarks/results/peers_cpu.json

A worker per system holds the same weights in bf16 and answers in turns, so that all meet the same
clock. Each figure is the time from the tokens of a prompt to its next token, of which nothing is
cached; first runs, in which systems compile or lay out weights, are told apart. CPU seconds are
those of the worker's process, all threads together. Systems without an installed Python are left
out, by name. Every system of a kind is timed as it comes, and OpenVINO with products in fp32 too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.peers.write_gguf import write_gguf
from mpass.evaluate.environment import describe_environment
from mpass.files import cache_dir
from mpass.inspection.text_table import open_console
from mpass.models.load import load_tokenizer, model_folder
from mpass.models.texts import find_text, load_tokens

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Peer:
    """A system: its worker, the variable that names its Python, where that is else, and a kind."""

    worker: str
    variable: str
    python: str
    kind: str = ""
    dense: bool = True


PEERS = {
    "mpass": Peer("run_mpass", "", "", "default", dense=False),
    "mpass fp32": Peer("run_mpass", "", "", "fp32", dense=False),
    "mpass half": Peer("run_mpass", "", "", "half", dense=False),
    "mpass int8": Peer("run_mpass", "", "", "int8", dense=False),
    "mpass int8 scores": Peer("run_mpass", "", "", "int8 scores", dense=False),
    "mpass half + int8 scores": Peer("run_mpass", "", "", "half int8", dense=False),
    "mpass all int8": Peer("run_mpass", "", "", "all int8", dense=False),
    "inductor": Peer("run_mpass", "", "", "inductor"),
    **{
        f"openvino {kind}": Peer(
            "run_openvino",
            "MPASS_OPENVINO_PYTHON",
            ".venv-openvino/bin/python",
            kind,
            dense=kind.startswith("dense"),
        )
        for kind in ("dense", "dense-f32", "xattention", "xattention-f32", "trishape")
    },
    "vllm": Peer("run_vllm", "MPASS_VLLM_PYTHON", ".venv-vllm/bin/python"),
    "llama.cpp": Peer("run_llama_cpp", "MPASS_LLAMA_PYTHON", ".venv-llama/bin/python"),
}


class Worker:
    """A process that holds a model in one system."""

    def __init__(self, peer: Peer, model: str, threads: int, longest: int) -> None:
        python = peer_python(peer)
        command = [
            *([python, "-m", f"benchmarks.peers.{peer.worker}"] if not peer.variable else []),
            *([python, str(HERE / f"{peer.worker}.py")] if peer.variable else []),
            model_for(peer, model),
            peer.kind,
            str(threads),
            str(longest),
        ]
        path = {} if not peer.variable else {"PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **path},
        )
        self.version = self.read()["version"]

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, what: str, tokens: Sequence[int], **more: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "tokens": tokens, **more}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peer_python(peer: Peer) -> str:
    """The interpreter of a system; "" where it is not installed."""
    if not peer.variable:
        return sys.executable
    chosen = os.environ.get(peer.variable, str(ROOT / peer.python))
    return chosen if Path(chosen).is_file() else ""


def model_for(peer: Peer, model: str) -> str:
    """The model as a system reads it, written into the cache if it is not there."""
    if peer.worker == "run_mpass":
        return model
    folder = model_folder(model, dtype=torch.bfloat16)
    if peer.worker == "run_vllm":
        return str(folder)
    if peer.worker == "run_openvino":
        target = cache_dir() / "peers" / f"openvino-{folder.name}"
        if not (target / "openvino_detokenizer.xml").is_file():
            script = str(HERE / "export_openvino.py")
            subprocess.run([peer_python(peer), script, str(folder), str(target)], check=True)
        return str(target)
    file = cache_dir() / "peers" / f"{model}-bf16.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(model, file)
    return str(file)


def measure(
    settings: argparse.Namespace, workers: dict[str, Worker], length: int
) -> dict[str, Any]:
    """Seconds, tokens and loss of every system on one prompt."""
    tokenizer = load_tokenizer(settings.model, dtype=torch.bfloat16)
    ids = load_tokens(find_text(settings.text).read(), tokenizer, length)[0].tolist()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    new = settings.new_tokens
    for turn in range(settings.repeats + 1):
        names = list(workers) if turn % 2 else list(reversed(workers))
        for name in names:
            runs[name].append(workers[name].ask("prefill", ids))
            told = runs[name][-1]
            print(f"{length}, {turn}: {name}, {told['cpu']:.2f} CPU s", file=sys.stderr, flush=True)
    return {
        name: {
            "first": taken[0],
            "cpu": statistics.median(run["cpu"] for run in taken[1:]),
            "wall": statistics.median(run["wall"] for run in taken[1:]),
            "runs": taken[1:],
            **(workers[name].ask("continue", ids, count=new) if new else {"tokens": []}),
            **(workers[name].ask("loss", ids) if length <= settings.loss_up_to else {}),
        }
        for name, taken in runs.items()
    }


def print_table(length: int, found: dict[str, Any]) -> None:
    table = Table("system", "CPU s", "of mpass", "wall s", "first run", "same tokens", "loss")
    own = found.get("mpass")
    truth = found.get("inductor", {}).get("tokens")
    for name, one in found.items():
        same = [a == b for a, b in zip(one["tokens"], truth or [], strict=False)]
        loss = one.get("loss")
        table.add_row(
            name,
            f"{one['cpu']:.2f}",
            f"{one['cpu'] / own['cpu']:.2f}" if own else "",
            f"{one['wall']:.2f}",
            f"{one['first']['wall']:.1f}",
            f"{sum(same)} of {len(same)}" if same else "",
            "" if loss is None else f"{loss:.4f}",
        )
    dense = {name: one["cpu"] for name, one in found.items() if PEERS[name].dense}
    open_console().print(table)
    if dense:
        fastest = min(dense, key=dense.__getitem__)
        open_console().print(f"{length} tokens; the fastest dense system is {fastest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a packaged model")
    parser.add_argument("--text", default="code")
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--systems", default=",".join(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16, help="0 spares another prefill")
    parser.add_argument("--loss-up-to", type=int, default=8192, help="tokens")
    parser.add_argument("--json", type=Path, help="write the figures here")
    settings = parser.parse_args()
    lengths = [int(length) for length in settings.lengths.split(",")]
    chosen = {name: PEERS[name] for name in settings.systems.split(",")}
    missing = [name for name, peer in chosen.items() if not peer_python(peer)]
    if missing:
        print(f"not installed (make peers): {', '.join(missing)}", file=sys.stderr)
    workers = {
        name: Worker(peer, settings.model, settings.threads, max(lengths))
        for name, peer in chosen.items()
        if name not in missing
    }
    results: dict[str, Any] = {
        "model": settings.model,
        "text": settings.text,
        "threads": settings.threads,
        "environment": describe_environment(),
        "versions": {name: worker.version for name, worker in workers.items()},
        "not_installed": missing,
        "results": {},
    }
    for length in lengths:
        results["results"][str(length)] = found = measure(settings, workers, length)
        print_table(length, found)
        if settings.json:
            settings.json.write_text(json.dumps(results, indent=2) + "\n")
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
