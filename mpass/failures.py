"""What happens when mpass itself fails: attention stays dense, and a report is ready to paste.

An error of ours must never end a user's program. Errors that users cause (`MpassError`), a lack of
memory, and the exceptions by which Dynamo starts an analysis again are none of ours: they pass.
With MPASS_STRICT=1, as in our tests, ours are raised too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Mapping

import torch

from mpass.errors import MpassError, in_one_line

VARIABLE = "MPASS_STRICT"
"""Environment variable under which our own errors are raised."""

FRAMES = 8
"""Frames of a traceback that a report shows, the last ones."""

OPS = 40
"""Names of ops that a report shows."""

_reported: set[tuple[object, ...]] = set()


class InternalErrorWarning(UserWarning):
    """mpass failed and fell back to dense attention; the text is a report of the error."""


def is_strict() -> bool:
    """Whether our own errors are raised instead of told."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def is_internal(error: BaseException) -> bool:
    """Whether an exception is a failure of ours, and not one that must go on to the caller."""
    if not isinstance(error, Exception):
        return False
    if isinstance(error, (MpassError, MemoryError, torch.OutOfMemoryError)):
        return False
    dynamo = sys.modules.get("torch._dynamo.exc")
    control = () if dynamo is None else (dynamo.RestartAnalysis, dynamo.SkipFrame)
    return not isinstance(error, control)


def contain(error: Exception, doing: str, ops: Mapping[str, int] | None = None) -> str:
    """Tell about a failure of ours and go on: the reason for which an attention stays dense.

    doing: what failed, as in "proving a mask"; ops: calls of the graph by name. Warns once in a
    process for each failure. Raises the error again if it is none of ours, or in strict mode.
    """
    if is_strict() or not is_internal(error):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = (type(error), doing, last and (last.filename, last.lineno))
    if place not in _reported:
        _reported.add(place)
        warnings.warn(failure_report(error, doing, ops or {}), InternalErrorWarning, stacklevel=2)
    return f"mpass failed in {doing}: {in_one_line(error)}"


def failure_report(error: Exception, doing: str, ops: Mapping[str, int]) -> str:
    """What a maintainer needs to know, and what it means for the user."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    names = [f"{name} x{count}" if count > 1 else name for name, count in ops.items()]
    shown = ", ".join(names[:OPS]) + (", ..." if len(names) > OPS else "")
    lines = [
        f"mpass failed in {doing}. The attention stays dense: results are right, and no faster.",
        f"Please report it with the lines below. {VARIABLE}=1 raises the error instead.",
        f"  mpass {version()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        f"  {in_one_line(error)}",
        *(f"    {frame.filename}:{frame.lineno}, in {frame.name}" for frame in frames),
    ]
    return "\n".join([*lines, f"  ops of the graph: {shown}"] if shown else lines)


def version() -> str:
    """The installed version, as far as that is known."""
    try:
        return importlib.metadata.version("mpass")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
