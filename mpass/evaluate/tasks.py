"""Retrieval tasks, generated from seeds.

The RULER tasks follow their published definitions (Hsieh et al., "RULER: What's the Real Context
Size of Your Long-Context Language Models?", 2024, section 3 and appendix B), `number` and
`key_value` those of InfiniteBench (Zhang et al., 2024), `passkey` that of Mohtashami and Jaggi,
2023. A task is a function of a random generator and a haystack text and gives a Puzzle.
"""

from __future__ import annotations

import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mpass.evaluate.questions import one_document, two_documents
from mpass.evaluate.samples import Puzzle

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
)
DEPTHS = 40
"""Places over the haystack at which a needle may stand."""

ADJECTIVES = """amber ancient bitter bright broken calm careful clever cold copper crimson curious
    daring distant eager early faint fierce frozen gentle golden grand hidden hollow humble icy
    jolly keen lonely lucky marble mellow misty narrow noble odd patient plain proud quiet rapid
    rough rusty scarlet silent silver simple solid steady sturdy sudden swift tender tidy velvet
    vivid warm wild wise young zealous""".split()
NOUNS = """anchor apple arrow badge barrel basket beacon bell bridge bucket button candle canyon
    castle cedar circle cloud compass cottage dragon eagle engine falcon feather forest fountain
    garden glacier hammer harbor island jacket kettle kitten ladder lantern library magnet maple
    meadow mirror mountain needle ocean orchard otter pebble pencil pillow planet quarry rabbit
    ribbon river saddle sparrow spider temple thunder ticket tiger tower turtle valley violin
    walnut whistle willow window winter wizard""".split()


@dataclass(frozen=True)
class Haystack:
    """Text that hides the needles: its units in order, sentences or lines."""

    name: str
    units: tuple[str, ...]
    separator: str

    def words(self) -> list[str]:
        """Its different lower-case words of 4 to 9 letters, sorted."""
        found = re.findall(r"\b[a-z]{4,9}\b", " ".join(self.units))
        return sorted(set(found))


def make_haystack(name: str, text: str) -> Haystack:
    """Cut a text into lines if it is code, else into sentences."""
    if name == "code":
        return Haystack(name, tuple(line for line in text.splitlines() if line.strip()), "\n")
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return Haystack(name, tuple(sentences), " ")


def cycle_from(units: Sequence[str], start: int) -> Callable[[], Iterator[str]]:
    """The units without end, from one of them on; each call starts anew."""
    return lambda: itertools.cycle(itertools.chain(units[start:], units[:start]))


def make_key(rng: random.Random, kind: str) -> str:
    """A key or value: `words` (adjective-noun), `numbers` (7 digits) or `uuids`."""
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def different_keys(rng: random.Random, kind: str, count: int) -> list[str]:
    """`count` keys of a kind, no two the same."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[make_key(rng, kind)] = None
    return list(keys)


def random_depth(rng: random.Random) -> float:
    """One of the `DEPTHS` evenly spaced places."""
    return random_depths(rng, 1)[0]


def random_depths(rng: random.Random, count: int) -> list[float]:
    """Different ones of the `DEPTHS` evenly spaced places, in any order."""
    return [step / (DEPTHS - 1) for step in rng.sample(range(DEPTHS), count)]


def needle(
    rng: random.Random,
    haystack: Haystack,
    *,
    hay: str = "text",
    key_kind: str = "words",
    value_kind: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    depth: float | None = None,
) -> Puzzle:
    """The needle family: `keys` keys with `values` values each, of which `queries` are asked for.

    hay: "noise" (a repeated sentence), "text", or "needles" (other needles, nothing else).
    depth: where the needle stands, if there is one; else at random.
    """
    keys = max(keys, queries)
    names = different_keys(rng, key_kind, keys)
    found = {name: different_keys(rng, value_kind, values) for name in names}
    thing = value_kind.removesuffix("s")

    def hide(name: str, value: str) -> str:
        return f"One of the special magic {value_kind} for {name} is: {value}."

    needles = [hide(name, value) for name, all_values in found.items() for value in all_values]
    depths = random_depths(rng, len(needles)) if depth is None else [depth] * len(needles)
    inserts = tuple(zip(depths, needles, strict=True))
    asked = names[:queries]
    # Values are asked for in the order in which the text gives them.
    order = sorted(range(len(inserts)), key=lambda i: inserts[i][0])
    texts = [inserts[i][1] for i in order]
    answers = [
        value
        for name in asked
        for value in sorted(found[name], key=lambda v, name=name: texts.index(hide(name, v)))  # type: ignore[misc]
    ]
    if hay == "needles":
        seed = rng.getrandbits(64)

        def distractors() -> Iterator[str]:
            other = random.Random(seed)
            while True:
                name = make_key(other, key_kind)
                if name not in found:
                    yield hide(name, make_key(other, value_kind))

        filler, separator = distractors, "\n"
    elif hay == "noise":
        filler, separator = cycle_from(NOISE, 0), "\n"
    else:
        filler = cycle_from(haystack.units, rng.randrange(len(haystack.units)))
        separator = haystack.separator
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
    if len(answers) == 1:
        intro = f"A special magic {thing} is hidden"
        about, verb, plural = f"the {thing}", "is", thing
        question = f"What is the special magic {thing}"
    else:
        intro = f"Some special magic {value_kind} are hidden"
        about, verb, plural = f"the {value_kind}", "are", value_kind
        question = f"What are all the special magic {value_kind}"
    return Puzzle(
        head=f"{intro} within the following text. Make sure to memorize it. "
        f"I will quiz you about {about} afterwards.",
        filler=filler,
        inserts=inserts,
        tail=f"\n{question} for {query} mentioned in the provided text? "
        f"The special magic {plural} for {query} mentioned in the provided text {verb}",
        answers=tuple(answers),
        separator=separator,
    )


def variable_tracking(rng: random.Random, haystack: Haystack) -> Puzzle:
    """One chain of four hops: `VAR A = 12345`, `VAR B = VAR A`, ...; find all five names."""
    names: dict[str, None] = {}
    while len(names) < 5:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    chain, value = list(names), str(rng.randint(10_000, 99_999))
    steps = [f"VAR {chain[0]} = {value}"]
    steps += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(chain)]
    depths = sorted(random_depths(rng, len(steps)))
    return Puzzle(
        head="Memorize and track the chain(s) of variable assignment hidden in the following "
        "text.\n",
        filler=cycle_from(NOISE, 0),
        inserts=tuple(zip(depths, steps, strict=True)),
        tail=f"\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above. Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(chain)} variables are assigned the value {value}, they are:",
        answers=tuple(chain),
        separator="\n",
    )


def common_words(rng: random.Random, haystack: Haystack) -> Puzzle:
    """A numbered list of words: ten common ones, the others three times each.

    The definition gives the common ones thirty occurrences and as many others as the length takes;
    here every forty words have each common one once, so that the list can go on to any length.
    """
    words = haystack.words()
    rng.shuffle(words)
    common, others = words[:10], words[10:]
    seed = rng.getrandbits(64)

    def numbered() -> Iterator[str]:
        order = random.Random(seed)
        count = itertools.count(1)
        for start in itertools.count(0, 10):
            batch = common + 3 * [others[i % len(others)] for i in range(start, start + 10)]
            order.shuffle(batch)
            yield from (f"{next(count)}. {word}" for word in batch)

    return Puzzle(
        head="Below is a numbered list of words. In these words, some appear more often than "
        "others. Memorize the ones that appear most often.\n",
        filler=numbered,
        inserts=(),
        tail="\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:",
        answers=tuple(common),
    )


def frequent_words(rng: random.Random, haystack: Haystack) -> Puzzle:
    """Coded words whose frequencies fall as a zeta distribution with exponent 2; the top three."""
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(2000)]
    weights = [1 / (rank**2) for rank in range(1, len(vocabulary))]
    seed = rng.getrandbits(64)

    def coded() -> Iterator[str]:
        draw = random.Random(seed)
        while True:
            # The most frequent of all are dots, to be ignored.
            ranks = draw.choices(range(len(weights)), weights, k=64)
            yield from ("...." if rank == 0 else vocabulary[rank] for rank in ranks)

    return Puzzle(
        head="Read the following coded text and track the frequency of each coded word. Find the "
        "three most frequently appeared coded words.",
        filler=coded,
        inserts=(),
        tail="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
        "the three most frequently appeared words in the above coded text? Answer: According to "
        "the coded text above, the three most frequently appeared words are:",
        answers=tuple(vocabulary[1:4]),
    )


def passkey(rng: random.Random, haystack: Haystack) -> Puzzle:
    """A five-digit key between repetitions of a sentence."""
    key = str(rng.randint(10_000, 99_999))
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    return Puzzle(
        head="There is an important info hidden inside a lot of irrelevant text. Find it and "
        "memorize them. I will quiz you about the important information there.",
        filler=cycle_from(NOISE, 0),
        inserts=((random_depth(rng), hidden),),
        tail="\nWhat is the pass key? The pass key is",
        answers=(key,),
        separator="\n",
    )


def number(rng: random.Random, haystack: Haystack) -> Puzzle:
    """As passkey, with ten digits: five at random, then five times one of them again beside it."""
    digits = "".join(rng.choices(string.digits, k=5))
    while len(digits) < 10:
        place = rng.randrange(len(digits))
        digits = digits[: place + 1] + digits[place:]
    return Puzzle(
        head="There is an important info hidden inside a lot of irrelevant text. Find it. "
        "I will quiz you about the important information there.",
        filler=cycle_from(NOISE, 0),
        inserts=(
            (
                random_depth(rng),
                f"The sequence of digits is {digits}. Remember it. "
                f"{digits} is the sequence of digits.",
            ),
        ),
        tail="\nWhat is the sequence of digits? The sequence of digits is",
        answers=(digits,),
        separator="\n",
    )


def key_value(rng: random.Random, haystack: Haystack) -> Puzzle:
    """A JSON object of identifiers; the value of one of them."""
    key, value = make_key(rng, "uuids"), make_key(rng, "uuids")
    seed = rng.getrandbits(64)

    def pairs() -> Iterator[str]:
        other = random.Random(seed)
        while True:
            yield f'"{make_key(other, "uuids")}": "{make_key(other, "uuids")}",'

    return Puzzle(
        head="Extract the value corresponding to the specified key in the JSON object below.\n{",
        filler=pairs,
        inserts=((random_depth(rng), f'"{key}": "{value}",'),),
        tail=f'\n}}\nKey: "{key}"\nThe value associated with the specified key is:',
        answers=(value,),
        separator="\n",
    )


Task = Callable[[random.Random, Haystack], Puzzle]


def needle_task(**options: object) -> Task:
    """A member of the needle family."""
    return lambda rng, haystack: needle(rng, haystack, **options)  # type: ignore[arg-type]


TASKS: dict[str, Task] = {
    "niah_single_1": needle_task(hay="noise"),
    "niah_single_2": needle_task(),
    "niah_single_3": needle_task(value_kind="uuids"),
    "niah_multikey_1": needle_task(keys=4),
    "niah_multikey_2": needle_task(hay="needles"),
    "niah_multikey_3": needle_task(hay="needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": needle_task(values=4),
    "niah_multiquery": needle_task(queries=4),
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "qa_1": lambda rng, haystack: one_document(rng),
    "qa_2": lambda rng, haystack: two_documents(rng),
    "passkey": passkey,
    "number": number,
    "key_value": key_value,
}
"""Retrieval tasks by name."""


def make_puzzle(task: str, seed: int, haystack: Haystack) -> Puzzle:
    """The puzzle of a task and seed; the same on every machine."""
    return TASKS[task](random.Random(f"{task}/{seed}"), haystack)


def grid_puzzle(depth: float, seed: int, haystack: Haystack) -> Puzzle:
    """One needle at a given depth: a cell of the needle grid."""
    return needle(random.Random(f"grid/{seed}"), haystack, depth=depth)
