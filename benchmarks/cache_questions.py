"""Which questions a cache still answers that was cut to what the end of its prompt attends to.

    python benchmarks/cache_questions.py --length 8192 --keep 0.5 0.25 0.1 --json questions.jsonl \\
        --rules snap "snap(window=64, kernel=5)" recent random

Each prompt is a long text in which four people are told of: where one lives, what another works as,
keeps and drinks. It ends with a question about one of them. The answer is chosen among the twelve
that the kind of question has: the one that the model holds likeliest, by the mean log-likelihood of
its tokens; a guess is right in one of twelve. The prompt runs once through sparse or dense
attention (`--prefill`); then its cache is cut, see cut_caches.py. Prints, per share and rule, how
many questions are answered rightly, of all and of those that dense attention answers with its whole
cache. `--task document` asks instead which of the documents of mpass.evaluate's qa_1 says
something, among the names of all documents in the prompt.
With `--json` a line is added per answer, and a run that was cut off goes on where the file ends.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cut_caches import compile_for, cut_caches, num_bytes, parse_cut

from mpass.evaluate.samples import Puzzle, encode, fit
from mpass.evaluate.tasks import Haystack, cycle_from, make_haystack, make_puzzle
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import find_text

NAMES = """Alice Bruno Carla David Emma Felix Grace Henry Irene Jacob Karen Lucas Maria Nathan
    Olivia Peter Quentin Rachel Simon Teresa Victor Wendy""".split()

FACTS = {
    "city": (
        "{name} has lived in {value} for years. Everybody in {value} knows {name}.",
        "Question: In which city does {name} live?\nAnswer: {name} lives in",
        "Paris London Berlin Madrid Rome Vienna Moscow Tokyo Boston Chicago Dublin Cairo".split(),
    ),
    "work": (
        "{name} has worked as a {value} since school. No other {value} is as good as {name}.",
        "Question: What does {name} work as?\nAnswer: {name} works as a",
        "doctor teacher lawyer farmer baker pilot painter nurse judge sailor driver cook".split(),
    ),
    "animal": (
        "{name} keeps a {value} at home. The {value} follows {name} everywhere.",
        "Question: Which animal does {name} keep at home?\nAnswer: {name} keeps a",
        "dog cat horse rabbit parrot snake turtle goat duck mouse sheep pig".split(),
    ),
    "drink": (
        "{name} drinks nothing but {value}. There is always some {value} on the desk of {name}.",
        "Question: What does {name} drink?\nAnswer: {name} drinks",
        "water milk coffee tea beer wine juice lemonade cider rum vodka soda".split(),
    ),
}
"""Stories: what is told of a person, the question up to where the answer starts, and values."""


@dataclass(frozen=True)
class Choice:
    """What was chosen after one prompt from one cache; rule "whole" is the uncut one.

    chances: how many answers there were to choose from. margin: mean log-likelihood of the right
    answer less that of the best other one.
    """

    task: str
    length: int
    prefill: str
    seed: int
    share: float
    rule: str
    right: bool
    chosen: str
    chances: int
    margin: float
    bytes: int

    @property
    def place(self) -> tuple[object, ...]:
        """What no other choice has."""
        return self.task, self.length, self.prefill, self.seed, self.share, self.rule


def people(seed: int, haystack: Haystack) -> tuple[Puzzle, list[str]]:
    """A puzzle about one of four people, and what may be answered."""
    rng = random.Random(f"people/{seed}")
    kinds, names = sorted(FACTS), rng.sample(NAMES, len(FACTS))
    own = {kind: rng.choice(FACTS[kind][2]) for kind in kinds}
    stories = [
        FACTS[kind][0].format(name=name, value=own[kind])
        for kind, name in zip(kinds, names, strict=True)
    ]
    rng.shuffle(stories)
    asked = seed % len(FACTS)
    _, question, values = FACTS[kinds[asked]]
    puzzle = Puzzle(
        head="Read the text and answer the question about it.\n\n",
        filler=cycle_from(haystack.units, rng.randrange(len(haystack.units))),
        inserts=tuple(((place + rng.random()) / 4, told) for place, told in enumerate(stories)),
        tail="\n\n" + question.format(name=names[asked]),
        answers=(own[kinds[asked]],),
        separator=haystack.separator,
    )
    return puzzle, values


def make(task: str, seed: int, haystack: Haystack, tokenizer: Any, length: int) -> tuple[Any, ...]:
    """The tokens of a prompt [1, N], the right answer, and all that it is chosen from."""
    if task == "people":
        puzzle, values = people(seed, haystack)
    else:
        puzzle, values = make_puzzle("qa_1", seed, haystack), []
    sample = fit(puzzle, tokenizer, length)
    prompt = sample.tokens[:, : sample.prompt]
    if task == "document":
        text = tokenizer.decode(prompt[0])
        values = re.findall(r"Document: (?:class|function) (\w+) of", text)
    return prompt, sample.answers[0], sorted(set(values))


def likelihoods(
    model: Any, cache: Any, last: torch.Tensor, answers: list[list[int]]
) -> list[float]:
    """The mean log-likelihood of the tokens of each answer after a prompt's last token [1, 1]."""
    first = model(last, past_key_values=cache).logits[0, -1].float().log_softmax(-1)
    found = []
    for answer in answers:
        total = float(first[answer[0]])
        if len(answer) > 1:
            own = copy.deepcopy(cache)
            given = torch.tensor([answer[:-1]])
            rest = model(given, past_key_values=own).logits[0].float().log_softmax(-1)
            total += float(rest.gather(1, torch.tensor(answer[1:])[:, None]).sum())
        found.append(total / len(answer))
    return found


def told(choices: list[Choice]) -> Iterator[str]:
    """A line per prefill, share and rule."""
    known = {c.seed for c in choices if (c.prefill, c.rule, c.right) == ("dense", "whole", True)}
    groups: dict[tuple[str, float, str], list[Choice]] = {}
    for one in choices:
        groups.setdefault((one.prefill, -one.share, one.rule), []).append(one)
    for (prefill, share, rule), own in sorted(groups.items()):
        strict = [c for c in own if c.seed in known]
        yield (
            f"{own[0].task} {own[0].length} {prefill:6} {-share:4.0%} {rule:34} "
            f"{sum(c.right for c in own)} of {len(own)}, {sum(c.right for c in strict)} of "
            f"{len(strict)} that dense attention answers, {own[0].bytes / 2**20:.1f} MiB, "
            f"margin {sum(c.margin for c in own) / len(own):+.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--task", choices=["people", "document"], default="people")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--rules", nargs="+", default=["snap", "recent", "random"])
    parser.add_argument("--prefill", nargs="+", choices=["sparse", "dense"], default=["sparse"])
    parser.add_argument("--json", type=Path, help="a file of lines; what it has is not run again")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cuts = [parse_cut(share, rule) for share in given.keep for rule in given.rules]
    cuts.insert(0, parse_cut(1.0, "whole"))
    lines = given.json.read_text().splitlines() if given.json and given.json.exists() else []
    choices = [Choice(**json.loads(line)) for line in lines]
    model, tokenizer = load_model(given.model, dtype=parse_dtype(given.dtype))
    haystack = make_haystack(given.text, find_text(given.text).read())
    for prefill in given.prefill:
        torch._dynamo.reset()
        forward = compile_for(model, prefill)
        for seed in range(given.samples):
            key = given.task, given.length, prefill, seed
            done = {c.place for c in choices}
            left = [c for c in cuts if (*key, c.share, c.text) not in done]
            if not left:
                continue
            prompt, answer, values = make(given.task, seed, haystack, tokenizer, given.length)
            answers = [encode(tokenizer, f" {value}") for value in values]
            right = values.index(answer)
            with torch.no_grad():
                for cut, cache in cut_caches(model, forward, prompt[:, :-1], left):
                    size = num_bytes(cache)
                    found = likelihoods(model, cache, prompt[:, -1:], answers)
                    chosen = max(range(len(found)), key=found.__getitem__)
                    others = max(v for place, v in enumerate(found) if place != right)
                    one = Choice(
                        *key,
                        cut.share,
                        cut.text,
                        found[right] > others,
                        values[chosen],
                        len(values),
                        round(found[right] - others, 3),
                        size,
                    )
                    print(json.dumps(asdict(one)), flush=True)
                    choices.append(one)
                    if given.json:
                        with given.json.open("a") as file:
                            file.write(json.dumps(asdict(one)) + "\n")
    own = [c for c in choices if (c.task, c.length) == (given.task, given.length)]
    print("\n".join(told(own)))


if __name__ == "__main__":
    main()
