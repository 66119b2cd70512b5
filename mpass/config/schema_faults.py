"""Where a config departs from config.schema.json, in words that say what to write instead.

A part that may have several forms is held against the form that it resembles most, and every fault
of it is told. jsonschema alone would name the fault of the form that fails first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpass.errors import nearest

LONGEST = 200
"""Characters of a message of jsonschema that are shown; it quotes the part at fault."""

STAND_INS = ("name", "type", "kind", "method")
"""Keys that others use for what is called "pattern" here."""


def schema_faults(document: Any, schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every departure of a document: its JSON path, and what is wrong, in the document's order."""
    import jsonschema

    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return list(dict.fromkeys(fault for error in errors for fault in faults_of(error)))


def faults_of(error: Any) -> Iterator[tuple[str, str]]:
    """The faults behind one error of jsonschema."""
    if error.validator == "oneOf" and error.context:
        branch = likely_branch(error)
        if unnamed := [each for each in branch if lacks_pattern(each)]:
            yield from pattern_faults(unnamed[0], branch)
            return
        for each in branch:
            yield from faults_of(each)
    elif error.validator == "additionalProperties" and error.validator_value is False:
        known = list(error.schema["properties"])
        for key in error.instance:
            if key not in known:
                yield (
                    error.json_path,
                    f"unknown key {key!r}{nearest(key, known)}; known: {', '.join(known)}",
                )
    elif lacks_pattern(error):
        yield from pattern_faults(error, [])
    else:
        message = error.message
        yield error.json_path, message if len(message) < LONGEST else message[:LONGEST] + " ..."


def likely_branch(error: Any) -> Sequence[Any]:
    """The errors of the form that the part at fault was meant to have.

    An object that has a key of the long form of a layer, or nearly, is one; others are patterns.
    """
    branches: dict[int, list[Any]] = {}
    for each in error.context:
        branches.setdefault(each.schema_path[0], []).append(each)
    kinds = {number: own for number, own in branches.items() if not of_other_type(own)}
    if not kinds:
        return [most_general(error)]
    if len(kinds) == 1 or not isinstance(error.instance, dict):
        return next(iter(kinds.values()))
    for number, own in kinds.items():
        form = error.validator_value[number]
        if "not" in form and resembles(error.instance, form["properties"]):
            return own
    return next(iter(kinds.values()))


def of_other_type(errors: Sequence[Any]) -> bool:
    """Whether a form is of another JSON type than the part: all of its own forms, too."""
    return any(
        not each.relative_path
        and (
            each.validator == "type"
            or (
                each.validator == "oneOf"
                and all(of_other_type([inner]) for inner in each.context if not inner.relative_path)
                and not any(inner.relative_path for inner in each.context)
            )
        )
        for each in errors
    )


def most_general(error: Any) -> Any:
    """What jsonschema calls the best match, where no form has the part's type."""
    import jsonschema

    return jsonschema.exceptions.best_match(error.context)


def resembles(item: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    """Whether an object has one of these keys, or one that is close to it and not to "pattern"."""
    return "pattern" not in item and any(
        bool(close) and close[0] != "pattern"
        for key in item
        for close in [difflib.get_close_matches(key, [*keys, "pattern"], n=1)]
    )


def lacks_pattern(error: Any) -> bool:
    """Whether an object stands where a pattern is and does not name one."""
    return error.validator == "required" and "pattern" in error.validator_value


def pattern_faults(error: Any, branch: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """What an object without the name of its pattern lacks, and its other faults."""
    keys = list(error.instance)
    close = difflib.get_close_matches("pattern", keys, n=1)
    meant = (close or [key for key in STAND_INS if key in keys] or [None])[0]
    hint = "" if meant is None else f", not {meant!r}"
    yield (
        error.json_path,
        f"the key 'pattern' is missing: it names the pattern{hint}, as in "
        '{"pattern": "a_shape", "sink_size": 64}',
    )
    for each in branch:
        if each is not error and list(each.relative_path) != [meant]:
            yield from faults_of(each)
