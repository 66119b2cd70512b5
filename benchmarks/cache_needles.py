"""How many needles a cache still answers that was cut to what the end of its prompt attends to.

    python benchmarks/cache_needles.py --length 8192 --keep 0.5 0.25 --json needles.jsonl \\
        --rules snap "snap(window=16, kernel=21)" recent random

Each prompt hides a needle and ends with the question. It runs once through attention (`--prefill`
sparse or dense); then its cache is cut to a share of the keys, and decoding goes on from it: by
SnapKV with its defaults or the numbers given (`snap`), to the first 4 and the last keys (`recent`),
and to random ones and the last 64 (`random`). `snap(kernel=21, compact=True)` moves the kept keys
together (FINCH). A needle is told if each token of it is the likeliest
after those before it. Prints, per share and rule, how many of the needles were told of those that
the whole cache tells, what the cache takes, and CPU seconds per token.
With `--json` a line is added per answer, and a run that was cut off goes on where the file ends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cut_caches import Cut, compile_for, cut_caches, num_bytes, parse_cut

from mpass.evaluate.samples import Sample, fit
from mpass.evaluate.tasks import make_haystack, make_puzzle
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import find_text


@dataclass(frozen=True)
class Answer:
    """What was said after one prompt from one cache; rule "whole" is the uncut one."""

    task: str
    length: int
    prefill: str
    seed: int
    share: float
    rule: str
    score: float
    said: str
    bytes: int
    seconds_per_token: float

    @property
    def place(self) -> tuple[object, ...]:
        """What no other answer has."""
        return self.task, self.length, self.prefill, self.seed, self.share, self.rule


def answer(model: Any, cache: Any, sample: Sample) -> tuple[torch.Tensor, float, float]:
    """The likeliest token at each place of the answer, the share of needles told, and CPU seconds
    per token.
    """
    likeliest = []
    start = time.process_time()
    for place in range(sample.prompt - 1, sample.tokens.shape[1] - 1):
        step = sample.tokens[:, place : place + 1]
        likeliest.append(model(step, past_key_values=cache).logits[0, -1].argmax())
    seconds = (time.process_time() - start) / len(likeliest)
    said = torch.stack(likeliest)
    right = said == sample.tokens[0, sample.prompt :]
    told = [bool(right[a - sample.prompt : b - sample.prompt].all()) for a, b in sample.spans]
    return said, sum(told) / len(told), seconds


def answers_of(
    model: Any, tokenizer: Any, forward: Any, sample: Sample, like: Answer, cuts: list[Cut]
) -> Iterator[Answer]:
    """Answers of one prompt."""
    prompt = sample.tokens[:, : sample.prompt]
    for cut, cache in cut_caches(model, forward, prompt[:, :-1], cuts):
        size = num_bytes(cache)
        said, score, seconds = answer(model, cache, sample)
        yield replace(
            like,
            share=cut.share,
            rule=cut.text,
            score=score,
            said=tokenizer.decode(said),
            bytes=size,
            seconds_per_token=round(seconds, 4),
        )


def told(answers: list[Answer]) -> Iterator[str]:
    """A line per prefill, share and rule."""
    found = {a.place[:4] for a in answers if a.rule == "whole" and a.score >= 1}
    groups: dict[tuple[str, int, str, float, str], list[Answer]] = {}
    for one in answers:
        groups.setdefault((one.task, one.length, one.prefill, -one.share, one.rule), []).append(one)
    for (task, length, prefill, share, rule), own in sorted(groups.items()):
        known = [a for a in own if a.place[:4] in found]
        right = sum(a.score >= 1 for a in known)
        yield (
            f"{task} {length} {prefill:6} {-share:5.0%} {rule:32} {right} of {len(known)} that the "
            f"whole cache tells, {own[0].bytes / 2**20:.1f} MiB, "
            f"{statistics.median(a.seconds_per_token for a in own):.3f} s per token"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--task", default="passkey")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    parser.add_argument("--rules", nargs="+", default=["snap", "recent", "random"])
    parser.add_argument("--prefill", nargs="+", choices=["sparse", "dense"], default=["sparse"])
    parser.add_argument("--json", type=Path, help="a file of lines; what it has is not run again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cuts = [parse_cut(share, rule) for share in given.keep for rule in given.rules]
    cuts.insert(0, parse_cut(1.0, "whole"))
    lines = given.json.read_text().splitlines() if given.json and given.json.exists() else []
    answers = [Answer(**json.loads(line)) for line in lines]
    model, tokenizer = load_model(given.model, dtype=parse_dtype(given.dtype))
    haystack = make_haystack(given.text, find_text(given.text).read())
    for prefill in given.prefill:
        torch._dynamo.reset()
        forward = compile_for(model, prefill)
        for seed in range(given.samples):
            like = Answer(given.task, given.length, prefill, seed, 0.0, "", 0.0, "", 0, 0.0)
            done = {a.place for a in answers}
            left = [c for c in cuts if replace(like, share=c.share, rule=c.text).place not in done]
            if not left:
                continue
            sample = fit(make_puzzle(given.task, seed, haystack), tokenizer, given.length)
            with torch.no_grad():
                for one in answers_of(model, tokenizer, forward, sample, like, left):
                    print(f"{seed} {one.share:.0%} {one.rule}: {one.said!r}", flush=True)
                    answers.append(one)
                    if given.json:
                        with given.json.open("a") as file:
                            file.write(json.dumps(asdict(one)) + "\n")
    own = [a for a in answers if (a.task, a.length) == (given.task, given.length)]
    print("\n".join(told(own)))


if __name__ == "__main__":
    main()
