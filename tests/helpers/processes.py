"""Python in a new process, for what a process does once: import, probe, warn, run out of memory."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.paths import ROOT


def run_python(
    *arguments: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter with `arguments` at the repository's root and returns what it printed.

    variables: environment variables besides those of this process.
    check: the process has to end with 0; its errors are shown otherwise.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done
