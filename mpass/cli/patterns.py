"""`mpass patterns`: the sparse patterns with their parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import RenderableType

from mpass.cli.output import AS_JSON, JSON_OUTPUT, check_output, deliver


def patterns(as_json: AS_JSON = False, output: JSON_OUTPUT = None) -> None:
    """List the sparse patterns with their parameters."""
    check_output(output)
    from rich.markup import escape
    from rich.table import Table

    from mpass.patterns.base import Pattern, registered_patterns

    known = sorted(registered_patterns().items())

    def parameters(cls: type[Pattern]) -> dict[str, Any]:
        return {field.name: field.default for field in dataclasses.fields(cls)}

    def selects(cls: type[Pattern]) -> str:
        return (cls.__doc__ or "").strip().split("\n")[0]

    def listed() -> list[dict[str, Any]]:
        return [
            {"pattern": name, "parameters": parameters(cls), "selects": selects(cls)}
            for name, cls in known
        ]

    def table() -> RenderableType:
        shown = Table("pattern", "parameters and their defaults", "which keys a query looks at")
        for name, cls in known:
            fields = ", ".join(f"{key}={value}" for key, value in parameters(cls).items())
            shown.add_row(name, fields, escape(selects(cls)))
        return shown

    deliver(listed, table, output=output, as_json=as_json)
