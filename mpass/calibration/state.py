"""What a calibration has measured so far, one JSON line each: it can be stopped and resumed.

The first line is a fingerprint of everything that the measurements depend on. The file of another
calibration is put aside under the name NAME.old, so that it neither stands in the way nor is lost
at once; a file of something else is refused.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from mpass.errors import CalibrationError


class State:
    """Measurements by key, kept in memory and, if there is a path, appended to a file."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        if path is None:
            return
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        parsed = [value for line in lines if (value := parse_line(line)) is not None]
        if lines and (not parsed or parsed[0][0] != "fingerprint"):
            raise CalibrationError(
                f"{path} holds no calibration; give another state file (--state)"
            )
        if parsed and parsed[0] != ["fingerprint", fingerprint]:
            put_aside(path)
            parsed = []
        self.values = dict(parsed[1:])
        # Written anew: a line that a crash cut off would swallow the next one.
        text = "".join(
            json.dumps(entry) + "\n" for entry in [["fingerprint", fingerprint], *parsed[1:]]
        )
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise CalibrationError(f"{path} cannot be written: {error.strerror}") from error

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.values[key] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")


def put_aside(path: Path) -> None:
    """Rename the file of another calibration, and say so."""
    kept = path.with_name(path.name + ".old")
    try:
        path.replace(kept)
    except OSError as error:
        raise CalibrationError(f"{path} cannot be renamed: {error.strerror}") from error
    warnings.warn(
        f"{path} holds another calibration (other model, inputs or candidates): it is {kept} now, "
        "and this one starts anew",
        RuntimeWarning,
        stacklevel=3,
    )


def parse_line(line: str) -> list[Any] | None:
    """`[key, value]`, or None for a line that was cut off."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, list) and len(entry) == 2 else None
