"""What reading and rewriting a graph adds to a cold compile, and the debug mode while it is off.

    python benchmarks/compile_time.py --layers 32
    python benchmarks/compile_time.py --layers 32 --mask outside

A small-width Llama with as many layers as asked, its mask built in the graph and padding given, is
compiled by `backend="inductor"` and by `backend="minference"`, each in a process of its own with
empty caches; the passes, translation validation among them, and the hooks of the debug mode are
timed inside of the second. Prints CPU seconds and their share. They are those of the process that
compiles, without the compilers that it starts, and of our passes those of the thread that they run
in: other programs on the machine change little, and the shares are no smaller than they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LENGTH = 4096


LABELS = {"apply_passes": "passes", "validate_sites": "validate"}
"""Functions of mpass.backend, and the names of their times; the first one calls the second."""

DEBUG_HOOKS = ("open_trace", "close_trace", "finish_trace")
"""Functions of mpass.debug that every compile calls."""


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, with its CPU time added up under a name."""

    def run(*arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.thread_time() - start
        return result

    return run


def compile_once(backend: str, layers: int, outside: bool = False) -> dict[str, float]:
    """Cold CPU seconds of the first call, and those of our passes in it.

    outside: the mask is an input [1, 1, N, N], as of a static cache in `generate()`, so that the
    op that reads it at run time stands in the graph.
    """
    import setuptools  # noqa: F401  (Inductor loads it to compile; ours must not pay for being first)
    import transformers

    import mpass.backend

    seconds: dict[str, float] = {}
    for name in (*LABELS, *DEBUG_HOOKS):
        label = LABELS.get(name, "debug")
        original = getattr(mpass.backend, name)
        setattr(mpass.backend, name, timed(original, seconds, label))
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=LENGTH,
    )
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    if outside:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        start = time.process_time()
        compiled(ids, attention_mask=mask, use_cache=False)
        seconds["compile"] = time.process_time() - start
        start = time.process_time()
        compiled(ids, attention_mask=mask, use_cache=False)
        seconds["compile"] -= time.process_time() - start
    return seconds


def cold(backend: str, layers: int, mask: str) -> dict[str, float]:
    """`compile_once` in a process with empty caches."""
    settings = ["--backend", backend, "--layers", str(layers), "--mask", mask]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, *settings],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--backend", choices=["inductor", "minference"])
    parser.add_argument("--mask", choices=["inside", "outside"], default="inside")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.backend:
        print(json.dumps(compile_once(options.backend, options.layers, options.mask == "outside")))
        return
    plain = cold("inductor", options.layers, options.mask)
    ours = cold("minference", options.layers, options.mask)
    figures = {
        "layers": options.layers,
        "mask": options.mask,
        "torch": torch.__version__,
        "inductor_seconds": plain["compile"],
        "minference_seconds": ours["compile"],
        "passes_seconds": ours["passes"],
        "passes_share": ours["passes"] / plain["compile"],
        "validate_seconds": ours["validate"],
        "validate_share": ours["validate"] / plain["compile"],
        "debug_off_seconds": ours["debug"],
        "debug_off_share": ours["debug"] / ours["compile"],
    }
    for name, value in figures.items():
        print(f"{name:20} {value:.6f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
