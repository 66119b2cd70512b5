"""SparseConfig as JSON: our own versioned format, and telling it from the others.

A file is checked as a whole: the text (encoding, duplicate keys, NaN), then config.schema.json,
then what no schema can say (patterns and their ranges, overlaps). The error lists all that is
wrong, each with its JSON path.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpass.config.layer import ConfigFields, LayerConfig
from mpass.config.minference_format import looks_like_minference, parse_minference
from mpass.config.pattern_text import parse_pattern
from mpass.config.schema_faults import schema_faults
from mpass.config.spans import Span, as_span
from mpass.errors import ConfigFileError, MpassError, PatternValueError, nearest
from mpass.files import write_whole
from mpass.lowering.tiles import as_grid
from mpass.patterns.base import (
    Pattern,
    find_pattern,
    parameter_kinds,
    registered_patterns,
    take_parameter,
)

FORMAT = "mpass.sparse_config"
VERSION = 1

MAX_BYTES = 64 << 20
"""Larger files are refused unread: 80 layers of 128 heads take 1 MB."""

MAX_DEPTH = 64
"""Nesting that a file may have; ours takes 5."""

T = TypeVar("T")


def load_config(path: Path) -> ConfigFields:
    """Read a file in any format that `parse_config` knows; raises ConfigFileError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigFileError(path, [("$", f"larger than {MAX_BYTES >> 20} MiB")])
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigFileError(path, [("$", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigFileError(path, [("$", f"not UTF-8: byte {error.start}")]) from error
    return parse_config(text, path)


def save_config(config: ConfigFields, path: Path) -> None:
    """Write our own format whole; raises ConfigFileError if the place cannot be written."""
    text = config_to_json(config)
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigFileError(path, [("$", f"cannot be written: {error.strerror}")]) from error


def parse_config(text: str, source: str | Path) -> ConfigFields:
    """The config that a JSON text describes: ours, MInference's or Qwen's. source: for errors."""
    document = parse_json(text, source)
    if looks_like_minference(document):
        return parse_minference(document, source)
    return parse_own(document, source)


def parse_json(text: str, source: str | Path) -> Any:
    """A JSON text as plain objects, without duplicate keys, NaN or infinities."""
    try:
        document = json.loads(text, object_pairs_hook=JsonObject)
        errors = list(text_errors(document, "$", 0))
    except RecursionError as error:
        raise ConfigFileError(source, [("$", "nested too deeply")]) from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigFileError(source, [("$", f"not JSON: {error.msg} ({where})")]) from error
    except ValueError as error:  # an integer with more digits than Python converts
        raise ConfigFileError(source, [("$", f"not JSON: {error}")]) from error
    if errors:
        raise ConfigFileError(source, errors)
    return document


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which keys stood in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.duplicates = (
            sorted({key for key in keys if keys.count(key) > 1}) if (len(self) < len(keys)) else []
        )


def child(path: str, key: str) -> str:
    """The JSON path of a key, as jsonschema writes it."""
    return f"{path}.{key}" if key.isidentifier() else f"{path}[{key!r}]"


def text_errors(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    """What JSON itself lets pass and no config may have, each with its path."""
    if depth > MAX_DEPTH:
        yield path, "nested too deeply"
    elif isinstance(value, JsonObject):
        yield from ((path, f"key {key!r} stands here twice") for key in value.duplicates)
        for key, item in value.items():
            yield from text_errors(item, child(path, key), depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from text_errors(item, f"{path}[{i}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"{value} is no number that a config may hold"


def schema() -> Mapping[str, Any]:
    """The published JSON Schema of our format, and parameters of plugins that are text."""
    loaded: dict[str, Any] = json.loads(schema_text())
    parameters = loaded["$defs"]["pattern"]["oneOf"][1]["properties"]
    for cls in registered_patterns().values():
        for name, kind in parameter_kinds(cls).items():
            if kind.type is str:
                parameters[name] = {"type": ["number", "boolean", "string"]}
    return loaded


@functools.cache
def schema_text() -> str:
    """The file with the published JSON Schema."""
    return importlib.resources.files("mpass.config").joinpath("schema.json").read_text("utf-8")


def parse_own(document: Any, source: str | Path) -> ConfigFields:
    """A config from our own format; raises ConfigFileError."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        known = f'ours has "format": "{FORMAT}", MInference\'s is a list over layers'
        raise ConfigFileError(source, [("$", f"no format that mpass knows: {known}")])
    if document.get("version") != VERSION or isinstance(document.get("version"), bool):
        found = document.get("version")
        message = f"version {found!r} is not known; this mpass reads version {VERSION}"
        raise ConfigFileError(source, [("$.version", message)])
    errors = schema_faults(document, schema())
    if errors:
        raise ConfigFileError(source, errors)

    check = Checker()
    default = check.value("$.default", pattern_from_json, document.get("default"))
    layers: list[tuple[Span, LayerConfig]] = []
    for key, item in document.get("layers", {}).items():
        path = f"$.layers[{key!r}]"
        span = check.value(path, functools.partial(as_span, what="layer"), key)
        layer = parse_layer(item, path, check)
        if span is not None and layer is not None:
            taken = next((other for other, _ in layers if other.overlaps(span)), None)
            if taken is not None:
                check.errors.append((path, f"overlaps with layers['{taken}']"))
            layers.append((span, layer))
    if check.errors:
        raise ConfigFileError(source, check.errors)
    numbers = {
        key: document.get(key) for key in ("num_layers", "num_heads", "num_kv_heads", "min_seq_len")
    }
    for key, number in numbers.items():
        if isinstance(number, float):  # 32.0 is an integer to JSON Schema
            numbers[key] = int(number)
    provenance = tuple(document.get("provenance", {}).items())
    return ConfigFields(default, tuple(layers), provenance=provenance, **numbers)


class Checker:
    """Collects what is wrong with the parts of a document instead of stopping at the first."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []

    def value(self, path: str, parse: Callable[[Any], T], value: Any) -> T | None:
        """`parse(value)`, or None with the message noted; None for what is not there."""
        if value is None:
            return None
        try:
            return parse(value)
        except MpassError as error:
            self.errors.append((path, str(error)))
            return None


def parse_layer(item: Any, path: str, check: Checker) -> LayerConfig | None:
    """A layer from a pattern, a list of patterns or the long form; errors go to `check`."""
    if isinstance(item, list):
        item = {"heads": item}
    elif isinstance(item, str) or "pattern" in item:
        item = {"default": item}
    default = check.value(f"{path}.default", pattern_from_json, item.get("default"))
    heads, num_heads = parse_heads(item.get("heads", {}), f"{path}.heads", check)
    grid = check.value(f"{path}.grid", as_grid, item.get("grid"))
    named = item.get("num_heads", num_heads)
    if num_heads is not None and named != num_heads:
        check.errors.append((f"{path}.num_heads", f"is {named}, but {num_heads} heads are listed"))
    return check.value(
        path,
        lambda _: LayerConfig(
            default,
            heads,
            None if named is None else int(named),
            None if item.get("min_seq_len") is None else int(item["min_seq_len"]),
            tuple((int(head), tuple(row)) for head, row in item.get("records", {}).items()),
            grid,
        ),
        item,
    )


def parse_heads(
    item: Any, path: str, check: Checker
) -> tuple[tuple[tuple[int, Pattern], ...], int | None]:
    """The heads of a layer, and their number if all are listed."""
    if isinstance(item, list):
        patterns = [check.value(f"{path}[{i}]", pattern_from_json, p) for i, p in enumerate(item)]
        return tuple((i, p) for i, p in enumerate(patterns) if p is not None), len(item)
    heads: dict[int, Pattern] = {}
    for key, value in item.items():
        span = check.value(f"{path}[{key!r}]", functools.partial(as_span, what="head"), key)
        pattern = check.value(f"{path}[{key!r}]", pattern_from_json, value)
        if span is None or pattern is None:
            continue
        if span.last is None:
            check.errors.append((f"{path}[{key!r}]", "a span of heads must have an end"))
            continue
        for head in range(span.first, span.last + 1):
            if head in heads:
                check.errors.append((f"{path}[{key!r}]", f"head {head} is named twice"))
                break
            heads[head] = pattern
    return tuple(sorted(heads.items(), key=lambda entry: entry[0])), None


def pattern_from_json(value: str | Mapping[str, Any]) -> Pattern:
    """A pattern from its name, or from an object with its name and parameters."""
    if isinstance(value, str):
        return parse_pattern(value)
    name = value["pattern"]
    cls = find_pattern(name)
    fields = [field.name for field in dataclasses.fields(cls)]
    parameters: dict[str, Any] = {}
    for key, given in value.items():
        if key == "pattern":
            continue
        if key not in fields:
            allowed = f"the parameters {', '.join(fields) or '(none)'}{nearest(key, fields)}"
            raise PatternValueError(name, key, given, allowed)
        parameters[key] = take_parameter(cls, name, key, given)
    return cls(**parameters)


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """A pattern as a JSON object, all parameters written out."""
    return {"pattern": pattern.name, **pattern.parameters()}


def layer_to_json(layer: LayerConfig) -> Any:
    """A layer in the shortest of its forms."""
    numbers = [head for head, _ in layer.heads]
    item: dict[str, Any] = {}
    if layer.default is not None:
        item["default"] = pattern_to_json(layer.default)
    if layer.heads and layer.num_heads == len(numbers) == numbers[-1] + 1:
        item["heads"] = [pattern_to_json(pattern) for _, pattern in layer.heads]
    else:
        if layer.num_heads is not None:
            item["num_heads"] = layer.num_heads
        if layer.heads:
            item["heads"] = {str(s): pattern_to_json(p) for s, p in head_spans(layer.heads)}
    if layer.min_seq_len is not None:
        item["min_seq_len"] = layer.min_seq_len
    if layer.grid is not None:
        item["grid"] = layer.grid.values()
    if layer.records:
        item["records"] = {str(head): list(row) for head, row in layer.records}
    if list(item) == ["default"]:
        return item["default"]
    if list(item) == ["heads"] and isinstance(item["heads"], list):
        return item["heads"]
    return item


def head_spans(heads: tuple[tuple[int, Pattern], ...]) -> list[tuple[Span, Pattern]]:
    """Heads in a row with one pattern, joined to spans."""
    spans: list[tuple[Span, Pattern]] = []
    for head, pattern in heads:
        if spans and spans[-1][0].last == head - 1 and spans[-1][1] == pattern:
            spans[-1] = (Span(spans[-1][0].first, head), pattern)
        else:
            spans.append((Span(head, head), pattern))
    return spans


def config_to_json(config: ConfigFields) -> str:
    """Our own format: one key a line, one layer a line."""
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for name in ("num_layers", "num_heads", "num_kv_heads", "min_seq_len"):
        if getattr(config, name) is not None:
            head[name] = getattr(config, name)
    if config.default is not None:
        head["default"] = pattern_to_json(config.default)
    if config.provenance:
        head["provenance"] = dict(config.provenance)
    lines = [f"  {json.dumps(key)}: {dump(value)}" for key, value in head.items()]
    if config.layers:
        rows = [
            f"    {json.dumps(str(span))}: {dump(layer_to_json(layer))}"
            for span, layer in config.layers
        ]
        lines.append('  "layers": {\n' + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def dump(value: Any) -> str:
    """One JSON value on one line; raises ConfigFileError for what JSON cannot hold, as NaN."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigFileError("<config>", [("$", f"cannot be written: {error}")]) from error


def layer_from_json(item: Any) -> LayerConfig:
    """The layer that `layer_to_json` wrote; what is wrong with it is a ConfigFileError."""
    check = Checker()
    layer = parse_layer(item, "$", check)
    if layer is None or check.errors:
        raise ConfigFileError("<decorator>", check.errors)
    return layer
