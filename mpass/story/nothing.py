"""Tells, when a program ends, that `backend="minference"` was asked for and compiled nothing.

`model = torch.compile(model, backend="minference"); model.generate(...)` is what people type first,
and it compiles nothing: `generate` belongs to the module inside of the wrapper, and calls that one.
Nothing is patched to find that out. torch looks the backend up when torch.compile is called, which
imports it, and at the end of the process it is known whether any graph came.
"""

from __future__ import annotations

import atexit
import logging
import sys

from mpass.story.graphs import graphs_kept
from mpass.story.merge import NOTHING_COMPILED

log = logging.getLogger(__name__)

LOOK_UP = ("lookup_backend", "registry.py")
"""The function of torch that imports a backend by its name, and the file that it stands in."""


def asked_by_name() -> bool:
    """Whether this import happens because torch.compile was given the backend's name."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == LOOK_UP[0] and code.co_filename.endswith(LOOK_UP[1]):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def tell_if_nothing() -> None:
    """Warn if no graph was compiled; logging's last resort writes it to standard error."""
    if graphs_kept() == 0:
        log.warning("%s", NOTHING_COMPILED)


def watch_for_nothing() -> None:
    """Ask for the notice, if the backend is imported by its name."""
    if asked_by_name():
        atexit.register(tell_if_nothing)
