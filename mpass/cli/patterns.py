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

    from mpass.patterns.base import registered_patterns

    listed: list[dict[str, Any]] = [
        {
            "pattern": name,
            "parameters": {field.name: field.default for field in dataclasses.fields(cls)},
            "selects": (cls.__doc__ or "").strip().split("\n")[0],
        }
        for name, cls in sorted(registered_patterns().items())
    ]

    def table() -> RenderableType:
        shown = Table("pattern", "parameters and their defaults", "which keys a query looks at")
        for item in listed:
            fields = ", ".join(f"{name}={value}" for name, value in item["parameters"].items())
            shown.add_row(item["pattern"], fields, escape(item["selects"]))
        return shown

    deliver(lambda: listed, table, output=output, as_json=as_json)
