"""`mpass env`: versions, processor and caches, to paste into a bug report."""

from __future__ import annotations

from mpass.cli.output import AS_JSON, JSON_OUTPUT, check_output, deliver


def env(as_json: AS_JSON = False, output: JSON_OUTPUT = None) -> None:
    """Print what mpass runs on: paste it into a bug report."""
    check_output(output)
    from mpass.inspection.environment import environment

    found = environment()
    width = max(map(len, found))

    def lines() -> str:
        return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())

    deliver(lambda: found, lines, output=output, as_json=as_json)
