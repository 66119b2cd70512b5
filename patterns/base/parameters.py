"""The parameters of a pattern: what type each field has, and which values it may hold.

A field is an int, a float, a bool, or a `Literal` of values of one of these types or of str. Its
annotation may be written as text (`from __future__ import annotations`) or not.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from mpass.errors import PatternClassError, PatternValueError

ALLOWED = "int, float, bool, or a Literal of values of one type: int, float, bool or str"
"""The types that a field may have, for messages."""

Value = int | float | bool | str


@dataclasses.dataclass(frozen=True)
class ParameterKind:
    """The type of one field.

    type: int, float, bool or str.
    choices: the values of a Literal; empty if every value of the type is allowed.
    """

    type: type
    choices: tuple[Value, ...] = ()

    def __str__(self) -> str:
        """`int`, or `one of 'row', 'block'` for a Literal."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        return self.type.__name__

    @property
    def schema(self) -> str:
        """The type of an op's argument that has one value per head."""
        return f"{self.type.__name__}[]"

    def take(self, value: object) -> Value | None:
        """The value as a parameter of this kind, or None if it is none: an int may be a float."""
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or (self.choices and value not in self.choices):
            return None
        return value  # type: ignore[return-value]


def parameter_kinds(cls: type) -> Mapping[str, ParameterKind]:
    """The kind of every field of a pattern's class; raises PatternClassError for other types."""
    return read_kinds(cls)


@functools.cache
def read_kinds(cls: type) -> Mapping[str, ParameterKind]:
    """`parameter_kinds`, read once per class."""
    return MappingProxyType(
        {field.name: kind_of(cls, field.name, field.type) for field in dataclasses.fields(cls)}
    )


def kind_of(cls: type, name: str, annotation: Any) -> ParameterKind:
    """The kind of one field; raises PatternClassError."""
    kind = evaluate(cls, name, annotation) if isinstance(annotation, str) else annotation
    if kind in (int, float, bool):
        return ParameterKind(kind)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    types = {type(choice) for choice in choices}
    if len(types) == 1 and types <= {int, float, bool, str}:
        return ParameterKind(types.pop(), choices)
    written = annotation if isinstance(annotation, str) else getattr(kind, "__name__", repr(kind))
    if choices:
        written = str(annotation).removeprefix("typing.")
    raise PatternClassError(cls, f"field {name!r} has the type {written}", f"make it {ALLOWED}")


def evaluate(cls: type, name: str, annotation: str) -> Any:
    """An annotation that is text as the type that it names; the text where no name is found."""
    owner = next(base for base in cls.__mro__ if name in inspect.get_annotations(base))
    names = vars(sys.modules[owner.__module__]) if owner.__module__ in sys.modules else {}
    try:
        return eval(annotation, {"Literal": Literal, **names}, dict(vars(owner)))
    except Exception:  # whatever the text is, the caller says what is allowed
        return annotation


def take_parameter(cls: type, pattern: str, name: str, value: object) -> Value:
    """A value as the parameter `name` of a class; raises PatternValueError.

    pattern: the name of the pattern, for the message.
    """
    kind = parameter_kinds(cls)[name]
    taken = kind.take(value)
    if taken is None:
        allowed = str(kind) if kind.choices else f"a value of type {kind}"
        raise PatternValueError(pattern, name, value, allowed)
    return taken
