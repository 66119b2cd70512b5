"""A story to hide needles in, and a tokenizer of which every token can be read."""

from __future__ import annotations

import random

STORY = " ".join(
    f"Sentence {i} tells of {''.join(random.Random(i).choices('abcdefgh', k=6))}."
    for i in range(400)
)


class CharTokenizer:
    """One token per character."""

    def __call__(self, text, *, add_special_tokens, verbose):
        if isinstance(text, list):
            return {"input_ids": [[ord(char) for char in item] for item in text]}
        return {"input_ids": [ord(char) for char in text]}


def text_of(sample):
    return "".join(map(chr, sample.tokens[0].tolist()))
