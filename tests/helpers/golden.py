"""Texts that were read and accepted, in files. MPASS_ACCEPT=1 accepts what is generated now."""

from __future__ import annotations

import os
from pathlib import Path


def assert_golden(text: str, path: Path) -> None:
    """The file at `path` holds exactly `text`. With MPASS_ACCEPT=1 it is written first."""
    if os.environ.get("MPASS_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; MPASS_ACCEPT=1 accepts the new text"
