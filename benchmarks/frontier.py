"""Density against loss: every registered pattern over its parameters, on real models and texts.

    python benchmarks/frontier.py --models smollm2 --texts code alice essays --lengths 8192

Each line of the result is one prefill through the public backend, all full-attention layers sparse:
the density really computed, the seconds of estimation and attention, and the loss over dense on the
same tokens. Dense attention is a line of its own for each model, text and length. Measured lines
are not measured again, so that a run can be stopped, started and widened; dense hidden states are
kept in the user's cache for that. `--patterns` takes names, for a pattern over its parameters, and
single settings. `--show` measures nothing: it draws what is there, two pictures per model and
length, and lists the settings that cost least, by their worst text (see frontier_report.py).
Seconds are CPU seconds, which a machine that does other things lengthens nonetheless.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from frontier_report import show
from torch import Tensor

from mpass.evaluate.environment import describe_environment
from mpass.evaluate.plan import DENSE, read_lines
from mpass.evaluate.runner import compile_dense, mean_density, sparse_options, window_layers
from mpass.evaluate.score import compare_all
from mpass.files import cache_dir
from mpass.inspection.profiling import outermost_ops
from mpass.lowering.recorder import Call, record
from mpass.models.load import load_model, parse_dtype
from mpass.models.prefill import compile_body, prefill
from mpass.models.texts import find_text, load_tokens
from mpass.patterns.base import registered_patterns

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
WARM_UP = 1024
"""Tokens of a first prefill, in which kernels are compiled."""
ROUND = 7
"""Settings whose prefills are kept to be scored together."""
KEY = ("model", "dtype", "text", "length", "pattern")
"""Fields under which a line is found again."""


def list_patterns(asked: Sequence[str] | None, length: int) -> list[str]:
    """Settings of the patterns in turn, so that a stopped run has some of every pattern.

    asked: names of patterns, for all their settings, and settings; all patterns if None.
    """
    known = {name: cls for name, cls in registered_patterns().items() if name != DENSE}
    columns = [known[item].sweep(length) if item in known else (item,) for item in asked or known]
    longest = max(map(len, columns), default=0)
    return [column[step] for step in range(longest) for column in columns if step < len(column)]


def compile_setting(model: Any, pattern: str, tokens: Tensor) -> Any:
    """The body with `pattern` in every full-attention layer, compiled by a first prefill.

    tokens: whose start that prefill takes; one graph serves all lengths. Dense fallbacks are off:
    the curve shows the pattern itself.
    """
    torch._dynamo.reset()
    if pattern == DENSE:
        forward = compile_dense(model, "eager")
    else:
        options = {"min_seq_len": 0, "dense_above": 1.0, "inner_backend": "eager"}
        forward = compile_body(model, "minference", sparse_options(model, pattern) | options)
    start = tokens[:, :WARM_UP].clone()
    torch._dynamo.mark_dynamic(start, 1)
    prefill(forward, start)
    return forward


def measure(model: Any, forward: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Last hidden states of a prefill, and its density and seconds.

    Seconds are those of the process, so that other processes' turns on the cores are left out; the
    profiler's share of them goes to estimation and attention of the full-attention layers, and to
    windows.
    """
    tokens = tokens.clone()
    torch._dynamo.mark_dynamic(tokens, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        wall, busy = time.perf_counter(), time.process_time()
        with record() as log:
            hidden = prefill(forward, tokens).last_hidden_state
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    scale = busy / torch.get_num_threads() / wall
    ops = outermost_ops(profiler.events(), cuda=False)
    index, attention, windows = (
        scale * seconds for seconds in split_seconds(ops, log.calls, window_layers(model))
    )
    return hidden, {
        "density": mean_density(model, log.calls),
        "rewritten_layers": len(log.calls),
        "prefill_seconds": wall * scale,
        "index_seconds": index,
        "attention_seconds": attention,
        "window_seconds": windows,
        "estimation_share": index / (index + attention),
    }


def split_seconds(
    ops: Iterable[tuple[str, float]], calls: Iterable[Call], windows: Sequence[int]
) -> tuple[float, float, float]:
    """Seconds of estimation and of attention of the full-attention layers, and of windows.

    ops: names and seconds in order; calls: what the sparse attentions among them were.
    """
    index = attention = window = pending = 0.0
    layers = iter(calls)
    for name, seconds in ops:
        if name == "minference::sparse_attention":
            if next(layers).layer in windows:
                window += pending + seconds
            else:
                index, attention = index + pending, attention + seconds
            pending = 0.0
        elif name.startswith("minference::") and name != "minference::check_block_lists":
            pending += seconds
        else:
            attention += seconds
    return index, attention, window


def dense_states(model: Any, name: str, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What `measure` gives for dense attention, from the user's cache if it was there before."""
    words = f"{name} {model.dtype} {torch.__version__} {torch.get_num_threads()}"
    key = hashlib.sha256(words.encode() + tokens.numpy().tobytes()).hexdigest()[:16]
    file = cache_dir() / "frontier" / f"{key}.pt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(measure(model, compile_setting(model, DENSE, tokens), tokens), file)
    hidden, figures = torch.load(file)
    return hidden, figures


def run(arguments: argparse.Namespace) -> None:
    """Measure what the output lacks."""
    for name in arguments.models:
        model = tokenizer = None
        for length in arguments.lengths:
            wanted = [DENSE, *list_patterns(arguments.patterns, length)]
            for start in range(0, len(wanted), ROUND):
                done = read_lines(arguments.output)
                missing = list_missing(done, name, length, arguments, wanted[start : start + ROUND])
                if not missing:
                    continue
                if model is None:
                    model, tokenizer = load_model(name, dtype=parse_dtype(arguments.dtype))
                texts = {
                    text: load_tokens(find_text(text).read(), tokenizer, length)
                    for text in {text for _, text in missing}
                }
                run_round(model, name, texts, missing, arguments)


def list_missing(
    done: Iterable[dict[str, Any]],
    name: str,
    length: int,
    arguments: argparse.Namespace,
    patterns: Iterable[str],
) -> list[tuple[str, str]]:
    """(pattern, text) of what has no line yet."""
    found = {tuple(line[field] for field in KEY) for line in done}
    return [
        (pattern, text)
        for pattern in patterns
        for text in arguments.texts
        if (name, arguments.dtype, text, length, pattern) not in found
    ]


def run_round(
    model: Any,
    name: str,
    texts: dict[str, Tensor],
    missing: Sequence[tuple[str, str]],
    arguments: argparse.Namespace,
) -> None:
    """Measure (pattern, text) pairs and write their lines.

    All prefills come first, one compilation per pattern; then each text's dense logits are made
    once for all of its prefills.
    """
    dense = {text: dense_states(model, name, tokens) for text, tokens in texts.items()}
    found: dict[str, dict[str, tuple[Tensor, dict[str, Any]]]] = {text: {} for text in texts}
    compiled = ("", None)
    for pattern, text in missing:
        if pattern != DENSE and pattern != compiled[0]:
            compiled = (pattern, compile_setting(model, pattern, texts[text]))
        own = dense[text] if pattern == DENSE else measure(model, compiled[1], texts[text])
        found[text][pattern] = own
        print(name, text, pattern, f"density {own[1]['density']:.3f}", flush=True)
    for text, measured in found.items():
        states = [hidden for hidden, _ in measured.values()]
        tokens = texts[text]
        losses = compare_all(model, dense[text][0], states, tokens, arguments.scored)
        with arguments.output.open("a", encoding="utf-8") as file:
            for (pattern, (_, figures)), own in zip(measured.items(), losses, strict=True):
                keys = (name, arguments.dtype, text, tokens.shape[1], pattern)
                line = dict(zip(KEY, keys, strict=True))
                line |= rounded(figures | dataclasses.asdict(own))
                line["command"] = command_of(line, arguments)
                file.write(json.dumps(line | {"versions": describe_environment()}) + "\n")


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Floats with six decimals: a nat's millionth, a microsecond."""
    return {
        name: [round(item, 6) for item in value]
        if isinstance(value, tuple)
        else round(value, 6)
        if isinstance(value, float)
        else value
        for name, value in figures.items()
    }


def command_of(line: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The command that measures one line."""
    words = [f"--{name}s {line[name]}" for name in ("model", "text", "length")]
    words += [f"--dtype {line['dtype']}", f"--threads {torch.get_num_threads()}"]
    if arguments.scored is not None:
        words.append(f"--scored {arguments.scored}")
    return " ".join(["python benchmarks/frontier.py", *words, f"--patterns '{line['pattern']}'"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--texts", nargs="+", default=["code", "alice", "essays"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--patterns", nargs="+", help="names and settings; all names if not given")
    parser.add_argument("--scored", type=int, help="positions of the loss; all if not given")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="show the output, measure nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.show:
        torch.set_num_threads(arguments.threads)
        run(arguments)
    show(read_lines(arguments.output), arguments.output.with_suffix(""))


if __name__ == "__main__":
    main()
