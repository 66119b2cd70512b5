"""MInference's per-head files, read as published and written back equal.

A file is a list over layers; a layer is `{"head": [pattern, a, b, score]}` over query heads. A head
that is missing has vertical_and_slash (1000, 6096). Qwen publishes the same list inside of
`config_1m.json` (under `dual_chunk_attention_config.sparse_attention_config`), or flat: keyed by
layer instead of listed, or with a list of heads instead of an object.

    vertical_and_slash a b   a columns, b diagonals          -> vertical_slash(a, b)
    stream_llm         a b   a first keys, a window of b     -> a_shape(a, b)
    block_sparse       - -   always the best 100 blocks      -> block_sparse(100, 64)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpass.config.layer import ConfigFields, LayerConfig
from mpass.config.spans import MAX_COUNT, Span
from mpass.errors import ConfigFileError, MpassError
from mpass.patterns.a_shape import AShape
from mpass.patterns.base import Pattern
from mpass.patterns.block_sparse import BlockSparse
from mpass.patterns.vertical_slash import VerticalSlash

DEFAULT = VerticalSlash(1000, 6096)
"""What MInference uses for a head that its file does not name."""

BLOCKS = BlockSparse(100, 64)
"""MInference's block_sparse; its two numbers in the file are ignored."""

MAX_SIZE = 1 << 30
"""Tokens or diagonals that a size may have."""

QWEN_KEYS = ("dual_chunk_attention_config", "sparse_attention_config")
"""Keys of a `config_1m.json`, outermost first; the first may be absent."""

Errors = list[tuple[str, str]]


def looks_like_minference(document: Any) -> bool:
    """Whether a JSON document is a list over layers, one of Qwen's forms, or keyed by layer."""
    if isinstance(document, list):
        return True
    if not isinstance(document, Mapping) or "format" in document:
        return False
    keyed = bool(document) and all(key.isdecimal() for key in document)
    return keyed or any(key in document for key in QWEN_KEYS)


def parse_minference(document: Any, source: str | Path) -> ConfigFields:
    """The config of such a document; raises ConfigFileError with all that is wrong."""
    errors: Errors = []
    path = "$"
    for key in QWEN_KEYS:
        if isinstance(document, Mapping) and key in document:
            document, path = document[key], f"{path}.{key}"
    layers = []
    for number, item, where in numbered(document, path, "layer", errors):
        layers.append((Span(number, number), parse_layer(item, where, errors)))
    if not errors and [span.first for span, _ in layers] != list(range(len(layers))):
        errors.append((path, "layers must be 0, 1, 2, ... without a gap"))
    if not layers and not errors:
        errors.append((path, "names no layer"))
    if errors:
        raise ConfigFileError(source, errors)
    return ConfigFields(DEFAULT, tuple(layers), num_layers=len(layers))


def numbered(document: Any, path: str, what: str, errors: Errors) -> Iterator[tuple[int, Any, str]]:
    """(number, item, path) of the layers of a file or the heads of a layer, ascending."""
    if isinstance(document, list):
        pairs: list[tuple[Any, Any]] = [(str(i), item) for i, item in enumerate(document)]
    elif isinstance(document, Mapping):
        pairs = list(document.items())
    else:
        errors.append((path, f"must be a list over {what}s or an object keyed by {what}"))
        return
    numbers: dict[int, tuple[Any, str]] = {}
    for key, item in pairs:
        where = f"{path}[{key}]" if isinstance(document, list) else f"{path}[{key!r}]"
        number = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else MAX_COUNT
        if number >= MAX_COUNT:
            errors.append((where, f"{what} {key[:40]!r} is no number below {MAX_COUNT}"))
        elif number in numbers:
            errors.append((where, f"{what} {number} is named twice"))
        else:
            numbers[number] = (item, where)
    for number in sorted(numbers):
        yield number, *numbers[number]


def parse_layer(item: Any, path: str, errors: Errors) -> LayerConfig:
    """One layer's heads. The numbers that decide nothing are kept as records."""
    heads, records = [], []
    for head, entry, where in numbered(item, path, "head", errors):
        pattern = parse_entry(entry, where, errors)
        if pattern is not None:
            heads.append((head, pattern))
            records.append((head, tuple(entry[1 if pattern == BLOCKS else 3 :])))
    return LayerConfig(None, tuple(heads), None, None, tuple(records))


def parse_entry(entry: Any, path: str, errors: Errors) -> Pattern | None:
    """The pattern of `[name, a, b]` or `[name, a, b, score]`."""
    if not isinstance(entry, list) or len(entry) not in (3, 4) or not isinstance(entry[0], str):
        errors.append((path, "must be [pattern, a, b, score]"))
        return None
    name, *numbers = entry
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        errors.append((path, "a, b and score must be numbers"))
        return None
    if name == "block_sparse":
        return BLOCKS
    classes = {"vertical_and_slash": VerticalSlash, "stream_llm": AShape}
    if name not in classes:
        known = ", ".join((*classes, "block_sparse"))
        errors.append((path, f"pattern {name[:40]!r} is not one of {known}"))
        return None
    sizes = numbers[:2]
    if not all(isinstance(size, int) and 0 <= size <= MAX_SIZE for size in sizes):
        errors.append((path, f"sizes {sizes} must be ints from 0 to {MAX_SIZE}"))
        return None
    try:
        return classes[name](*sizes)
    except MpassError as error:
        errors.append((path, str(error)))
        return None


def config_to_minference(config: ConfigFields) -> str:
    """The list over layers, as MInference reads it.

    A head that has the format's own default by `config.default` is left out, as it may be. Raises
    ConfigFileError for what the format cannot say: other patterns, open spans, unknown sizes.
    """
    errors: Errors = []
    if config.min_seq_len is not None or any(c.min_seq_len is not None for _, c in config.layers):
        errors.append(("$.min_seq_len", "MInference's format has no shortest length"))
    if any(layer.grid is not None for _, layer in config.layers):
        errors.append(("$.grid", "MInference's format has no grid"))
    count = config.num_layers or 1 + max((s.last or s.first for s, _ in config.layers), default=-1)
    if any(span.last is None for span, _ in config.layers) and config.num_layers is None:
        errors.append(("$.num_layers", "must be known where a span of layers is open"))
    rows = []
    for number in range(count):
        layer = config.layer(number)
        num_heads = layer.num_heads or config.num_heads
        default = layer.default or config.default
        heads: dict[int, Pattern] = dict(layer.heads)
        if default != DEFAULT:
            if num_heads is None or default is None:
                missing = "num_heads" if num_heads is None else "default"
                errors.append((f"$.layers.{number}.{missing}", "must be known in this format"))
                continue
            heads = {head: heads.get(head, default) for head in range(num_heads)}
        records = dict(layer.records)
        rows.append(
            {
                str(head): entry_of(pattern, records.get(head), f"$.layers.{number}.{head}", errors)
                for head, pattern in heads.items()
            }
        )
    if errors:
        raise ConfigFileError("<MInference's format>", errors)
    return json.dumps(rows)


def entry_of(
    pattern: Pattern, record: tuple[int | float, ...] | None, path: str, errors: Errors
) -> list[Any]:
    """`[name, a, b, score]`; the score is 0 where none is known."""
    if isinstance(pattern, VerticalSlash):
        sizes, name = (pattern.vertical_size, pattern.slash_size), "vertical_and_slash"
    elif isinstance(pattern, AShape):
        sizes, name = (pattern.sink_size, pattern.window_size), "stream_llm"
    elif pattern == BLOCKS:
        return ["block_sparse", *(record or (100, 1, 0))]
    else:
        errors.append((path, f"{pattern} has no name in MInference's format"))
        return []
    return [name, *sizes, *((0,) if record is None else record)]
