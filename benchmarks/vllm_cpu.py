"""Time to the first token in vLLM on a CPU, sparse and dense by turns in one engine.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py --model FOLDER [--chunk 2048] [--json FILE]
    .venv-vllm/bin/python benchmarks/vllm_cpu.py --model FOLDER --short 32 [--json FILE]

`make vllm` sets up the Python; the folder may be what mpass.models.load.model_folder gives for a
packaged model. Dense is vLLM's own attention: the same engine with no request split off. CPU
seconds are those of the process, on one thread; on a machine that does other work they are the
figure to trust, and seconds of wall time are not. `--short` asks what the plugin costs where
nothing is sparse: prompts of 200 tokens at once, vLLM's own methods put back in every other turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Of the engine: in this process, on one thread, with 1 GiB for the cache."""

SHORT, SHORT_TOKENS = 200, 8
"""Tokens of a short prompt, and tokens that it generates."""

ATTENTION = [0.0]
"""CPU seconds inside of attention since it was last set to 0."""


def processor() -> str:
    """The processor's name, as Linux has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_attention() -> None:
    """Add the CPU time of every attention to ATTENTION."""
    from mpass.serving.vllm.cpu import SparseCPUImpl

    forward = SparseCPUImpl.forward

    def timed(self: Any, *arguments: Any, **settings: Any) -> Any:
        start = time.process_time()
        out = forward(self, *arguments, **settings)
        ATTENTION[0] += time.process_time() - start
        return out

    SparseCPUImpl.forward = timed


@contextmanager
def dense(active: bool) -> Iterator[None]:
    """No request is split off: every layer is vLLM's own."""
    from mpass.serving.vllm.builder import SparseBuilder

    split_step = SparseBuilder.split_step
    if active:
        SparseBuilder.split_step = lambda self, common, metadata: None
    try:
        yield
    finally:
        SparseBuilder.split_step = split_step


@contextmanager
def without_plugin() -> Iterator[None]:
    """vLLM's own methods in place of the plugin's, in the same engine."""
    from mpass.serving.vllm.cpu import SparseCPUBuilder, SparseCPUImpl

    parents = {
        (SparseCPUImpl, "forward"): SparseCPUImpl.parent_class.forward,
        (SparseCPUBuilder, "build"): SparseCPUBuilder.parent_class.build,
    }
    ours = {(cls, name): getattr(cls, name) for cls, name in parents}
    for (cls, name), method in parents.items():
        setattr(cls, name, method)
    try:
        yield
    finally:
        for (cls, name), method in ours.items():
            setattr(cls, name, method)


def measure_short(llm: Any, ids: list[int], requests: int, repeats: int) -> dict[str, Any]:
    """Many short requests at once, with the plugin and without it by turns."""
    starts = range(0, 40 * requests, 40)
    prompts = [ids[start : start + SHORT] for start in starts]
    generate(llm, prompts[:2], SHORT_TOKENS, "sparse")
    turns = []
    for turn in range(2 * repeats):
        # The first of a pair is one in one pair and the other in the next.
        if turn % 4 in (0, 3):
            turns.append(generate(llm, prompts, SHORT_TOKENS, "plugin"))
        else:
            with without_plugin():
                turns.append(generate(llm, prompts, SHORT_TOKENS, "vllm"))
    assert all(turn["tokens"] == turns[0]["tokens"] for turn in turns)
    seconds = {
        kind: [turn["cpu"] for turn in turns if turn["kind"] == kind] for kind in ("plugin", "vllm")
    }
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    return {
        "requests": requests,
        "tokens_generated": SHORT_TOKENS,
        "cpu_seconds": seconds,
        "medians": medians,
        "ratio": round(medians["plugin"] / medians["vllm"], 4),
        "ratio_of_least": round(min(seconds["plugin"]) / min(seconds["vllm"]), 4),
    }


def generate(llm: Any, prompts: list[list[int]], tokens: int, kind: str) -> dict[str, Any]:
    """Greedy tokens of each prompt, and the seconds of the whole call."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    ATTENTION[0] = 0.0
    with dense(kind == "dense"):
        wall, cpu = time.perf_counter(), time.process_time()
        out = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        seconds = {
            "wall": round(time.perf_counter() - wall, 3),
            "cpu": round(time.process_time() - cpu, 3),
            "attention": round(ATTENTION[0], 3),
        }
    found = [list(one.outputs[0].token_ids) for one in out]
    cached = [one.num_cached_tokens for one in out]
    return {"kind": kind, **seconds, "cached": cached, "tokens": found}


def measure(llm: Any, ids: list[int], length: int, repeats: int, prefix: bool) -> dict[str, Any]:
    """First requests, then turns of sparse and dense over prompts that nothing has cached yet."""
    # Each prompt starts elsewhere in the text, so that no prefix of it is in the cache.
    prompts = iter([ids[start : start + length] for start in range(0, 40 * (2 * repeats + 3), 40)])
    first = [generate(llm, [next(prompts)], 1, "sparse") for _ in range(2)]
    turns = [
        generate(llm, [next(prompts)], 1, kind)
        for _ in range(repeats)
        for kind in ("dense", "sparse")
    ]
    medians = {
        kind: {
            name: statistics.median(turn[name] for turn in turns if turn["kind"] == kind)
            for name in ("wall", "cpu", "attention")
        }
        for kind in ("dense", "sparse")
    }
    found: dict[str, Any] = {
        "first_requests": [{name: one[name] for name in ("wall", "cpu")} for one in first],
        "turns": [
            {key: turn[key] for key in ("kind", "wall", "cpu", "attention")} for turn in turns
        ],
        "medians": medians,
        "ratio": {
            name: round(medians["sparse"][name] / medians["dense"][name], 3)
            for name in ("wall", "cpu", "attention")
        },
    }
    if prefix:
        # Half of a prompt is in the cache; the tail is new each time.
        half = length // 2
        generate(llm, [ids[: half + 16]], 1, "sparse")
        tails = [ids[:half] + ids[half + step : length + step] for step in (500, 900)]
        found["prefix"] = [
            {key: one[key] for key in ("kind", "wall", "cpu", "attention", "cached")}
            for tail, kind in zip(tails, ("dense", "sparse"), strict=True)
            for one in [generate(llm, [tail], 1, kind)]
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="a folder in transformers' format"
    )
    parser.add_argument("--length", type=int, default=8176, help="tokens of the prompts")
    parser.add_argument(
        "--chunk", type=int, default=0, help="tokens of a step; 0 for whole prompts"
    )
    parser.add_argument(
        "--short", type=int, default=0, help="so many short requests at once, and nothing else"
    )
    parser.add_argument("--prefix", action="store_true", help="cache prefixes, and use one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--settings", type=json.loads, default={}, help="the plugin's, as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    import torch
    from transformers import AutoTokenizer
    from vllm import LLM
    from vllm import __version__ as version

    from mpass.models.texts import find_text, load_tokens
    from mpass.serving.vllm import process_counters

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    needed = 2 * arguments.length
    ids = load_tokens(find_text("code").read(), tokenizer, needed)[0].tolist()
    started = time.perf_counter()
    llm = LLM(
        model=str(arguments.model),
        dtype=arguments.dtype,
        max_model_len=arguments.length + 16,
        max_num_seqs=arguments.short or 4,
        max_num_batched_tokens=arguments.chunk or arguments.length + 16,
        enable_chunked_prefill=arguments.chunk > 0,
        enable_prefix_caching=arguments.prefix,
        enforce_eager=True,
        additional_config={"minference": arguments.settings},
    )
    started = time.perf_counter() - started
    if arguments.short:
        measured = measure_short(llm, ids, arguments.short, arguments.repeats)
    else:
        time_attention()
        measured = measure(llm, ids, arguments.length, arguments.repeats, arguments.prefix)
    found = {
        "vllm": version,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "length": SHORT if arguments.short else arguments.length,
        "chunk": arguments.chunk,
        "prefix_caching": arguments.prefix,
        "dtype": arguments.dtype,
        "settings": arguments.settings,
        "seconds_to_start": round(started, 1),
        **measured,
        "counters": process_counters().as_dict(),
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.is_file() else []
        arguments.json.write_text(json.dumps([*kept, found], indent=1) + "\n")


if __name__ == "__main__":
    main()
