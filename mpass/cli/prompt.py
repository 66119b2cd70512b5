"""What the commands about one prompt share: the model's body, its inputs, the options."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mpass.errors import OptionValueError
from mpass.models.texts import TEXTS

MODELS = ("smollm2", "gemma3")
"""Names that a model may have beside a folder and a GGUF file."""

PATTERNS = (
    *("a_shape", "block_max", "block_sparse", "block_top_p", "dense", "flex_prefill"),
    *("sample_attention", "strided", "tri_shape", "union", "vertical_slash", "x_attention"),
)
"""What a shell completes; asking the registry would import torch. A test holds it against it."""

FIRST_TEXT = next(iter(TEXTS))

Dtype = Literal["bf16", "fp16", "fp32"]
InnerBackend = Literal["inductor", "aot_eager", "eager"]


def starting(words: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion of an option: those words that begin as what was typed."""
    known = tuple(words)

    def complete(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return complete


MODEL_HELP = "smollm2, gemma3, a folder in transformers' format, or a GGUF file."
PATTERN_HELP = "Pattern of every head: NAME or 'NAME(1000, 512)'; see `mpass patterns`."

MODEL = Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=starting(MODELS))]
TEXT = Annotated[
    str,
    typer.Option(
        help="Text of the prompt: a UTF-8 file, or " + ", ".join(TEXTS),
        autocompletion=starting(TEXTS),
    ),
]
LENGTH = Annotated[int, typer.Option(help="Tokens of the prompt.")]
PATTERN = Annotated[str | None, typer.Option(help=PATTERN_HELP, autocompletion=starting(PATTERNS))]
CONFIG = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A pattern per layer and head: JSON.")
]
DTYPE = Annotated[Dtype, typer.Option(help="Of the model.")]
DEVICE = Annotated[str, typer.Option(help="cpu or cuda.", autocompletion=starting(("cpu", "cuda")))]
MIN_SEQ_LEN = Annotated[int | None, typer.Option(help="Prompts shorter than this stay dense.")]
INNER_BACKEND = Annotated[InnerBackend, typer.Option(help="What compiles the rest of the graph.")]


def load_prompt(
    model: str, text: str, length: int, dtype: str, device: str
) -> tuple[Any, dict[str, Any]]:
    """The body of a model (embedding and layers) and its keyword arguments for a text."""
    from mpass.models.load import load_model, parse_dtype
    from mpass.models.texts import find_text, load_tokens

    loaded, tokenizer = load_model(model, dtype=parse_dtype(dtype), device=device)
    tokens = load_tokens(find_text(text).read(), tokenizer, length)
    return loaded.get_decoder(), {"input_ids": tokens.to(device), "use_cache": True}


def token_texts(model: str, tokens: Any, dtype: str) -> tuple[str, ...]:
    """The tokens of a prompt [1, N] as the texts that they stand for."""
    from mpass.models.load import load_tokenizer, parse_dtype

    tokenizer = load_tokenizer(model, dtype=parse_dtype(dtype))
    ids = tokens[0].tolist()
    known = {number: tokenizer.decode([number]) for number in set(ids)}
    return tuple(known[number] for number in ids)


def pass_options(
    pattern: str | None, config: Path | None, min_seq_len: int | None
) -> dict[str, Any]:
    """The options of a compile from those of a command, checked."""
    from mpass.config.pattern_text import parse_pattern
    from mpass.config.sparse_config import SparseConfig
    from mpass.options import parse_options

    options: dict[str, Any] = {}
    if pattern is not None:
        options["pattern"] = parse_pattern(pattern)
    if config is not None:
        options["config"] = SparseConfig.load(config)
    if min_seq_len is not None:
        options["min_seq_len"] = min_seq_len
    parse_options(None, options)
    return options


def tell_progress(every: float = 10.0) -> Callable[[str], None]:
    """A function that shows on stderr what is done: one line on a terminal, else now and then.

    every: seconds between the lines of a log. An empty text clears the line.
    """
    last = float("-inf")

    def tell(text: str) -> None:
        nonlocal last
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
        elif text and time.monotonic() - last >= every:
            sys.stderr.write(f"{text}\n")
            last = time.monotonic()
        sys.stderr.flush()

    return tell


def check_prompt(text: str, length: int, dtype: str, device: str) -> None:
    """Raise the error of whatever is wrong with a prompt, before a model is loaded."""
    from mpass.models.load import check_device, parse_dtype
    from mpass.models.texts import find_text

    parse_dtype(dtype)
    check_device(device)
    find_text(text)
    if length < 1:
        raise OptionValueError("length", length, "an int >= 1")
