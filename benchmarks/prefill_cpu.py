"""Prefill of a whole decoder on the CPU: `backend="minference"` against dense backends.

Dense is the fastest of Inductor and of the packages of mpass.evaluate.demo.PACKAGED_BACKENDS that
are installed; the table says which.

    python benchmarks/prefill_cpu.py --layers 1 --lengths 8192 16384 --dtype bf16

The decoder has the shape of Llama-3.1-8B (hidden 4096, 32 heads over 8 kv heads, head_dim 128,
intermediate 14336) with random weights, so the pattern's budgets are fixed ones: 1000 columns, and
the 100 nearest diagonals with 15 more. Random heads have those anywhere, so that each makes two
block diagonals, 33 in all: as many as 32 blocks of neighbouring diagonals of a trained head.
Interleaved in one process, medians; progress on stderr, with the seconds of every run. Beside the
two the attention alone is timed, because the rest of the layer (linear in the length) bounds what
any attention can give: `bound` is the speed-up if attention took no time at all, `of bound` how
much of that bound's saved time was really saved. Real text on a real model: `mpass demo`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table

from mpass.config.pattern_text import parse_pattern
from mpass.evaluate.demo import PACKAGED_BACKENDS
from mpass.inspection.text_table import open_console
from mpass.lowering.recorder import record
from mpass.models.load import parse_dtype


def build(layers: int, dtype: torch.dtype) -> torch.nn.Module:
    """The decoder's body: [1, N] token ids -> [1, N, 4096]."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=256,
        max_position_embeddings=1 << 20,
    )
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config, dtype=dtype).eval()


def seconds(name: str, run: Callable[[], object]) -> float:
    """Wall seconds of one run, told on stderr: a run may take minutes."""
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    start = time.perf_counter()
    run()
    elapsed = time.perf_counter() - start
    print(f"{elapsed:.1f} s", file=sys.stderr, flush=True)
    return elapsed


def measure(layers: int, length: int, dtype: torch.dtype, pattern: str, repeats: int) -> dict:
    """Median seconds of dense and sparse prefill, and of dense attention alone."""
    print(f"{length} tokens: making {layers} layers of weights", file=sys.stderr, flush=True)
    model = build(layers, dtype)
    ids = torch.randint(0, 256, (1, length))
    options = {"pattern": parse_pattern(pattern)}
    dense = torch.compile(model, backend="inductor", dynamic=False)
    sparse = torch.compile(model, backend="minference", dynamic=False, options=options)
    query = torch.randn(1, 32, length, 128, dtype=dtype)
    key = torch.randn(1, 8, length, 128, dtype=dtype)
    # What the dense graph holds: transformers, when traced, hands SDPA a mask and not is_causal.
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]

    def attention() -> None:
        for _ in range(layers):
            torch.nn.functional.scaled_dot_product_attention(
                query, key, key, attn_mask=mask, enable_gqa=True
            )

    runs: dict[str, Callable[[], object]] = {
        "inductor": lambda: dense(ids, use_cache=False),
        "sparse": lambda: sparse(ids, use_cache=False),
        "attention": attention,
    }
    # After the sparse one: such a package may change what Inductor does in the whole process.
    packaged = [name for name in PACKAGED_BACKENDS if find_spec(name) is not None]
    for name in packaged:
        import_module(name)  # which registers it
        other = torch.compile(model, backend=name, dynamic=False)
        runs[name] = functools.partial(other, ids, use_cache=False)
    density = None
    with torch.no_grad():
        for name, run in runs.items():
            if name != "attention":  # has nothing to compile
                with record() as log:
                    seconds(f"{length} tokens, {name}, first run with compiling", run)
                density = log.density() if name == "sparse" else density
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats):
            for name, run in runs.items():
                times[name].append(seconds(f"{length} tokens, {name}, {turn + 1}/{repeats}", run))
    torch._dynamo.reset()
    median = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(("inductor", *packaged), key=median.__getitem__)
    median["dense"] = median[fastest]
    return {
        "layers": layers,
        "length": length,
        "dtype": str(dtype),
        "pattern": pattern,
        "density": density,
        "dense_backend": fastest,
        **{f"{name}_seconds": value for name, value in median.items()},
        "speedup": median["dense"] / median["sparse"],
        "bound": median["dense"] / max(1e-9, median["dense"] - median["attention"]),
        "of_bound": (median["dense"] - median["sparse"]) / median["attention"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--pattern", default="vertical_slash(1000, 115)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    table = Table(
        "tokens",
        "density",
        "dense by",
        "dense s",
        "sparse s",
        "speed-up",
        "dense attention s",
        "bound",
        "of bound",
    )
    records = []
    for length in options.lengths:
        result = measure(
            options.layers, length, parse_dtype(options.dtype), options.pattern, options.repeats
        )
        records.append(result)
        table.add_row(
            str(length),
            f"{result['density']:.1%}",
            result["dense_backend"],
            *(f"{result[name]:.2f}" for name in ("dense_seconds", "sparse_seconds", "speedup")),
            f"{result['attention_seconds']:.2f}",
            f"{result['bound']:.2f}",
            f"{result['of_bound']:.0%}",
        )
    open_console().print(table)
    open_console().print("bound: the speed-up if attention took no time at all, the rest as it is")
    if options.json:
        figures = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**figures, "results": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
