"""Where mpass keeps what takes long to make, and how a folder gets there whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """`$MPASS_CACHE`, else `mpass` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("MPASS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mpass"


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `target` on success and removed on failure.

    A reader sees all of it or nothing. When another process was faster its folder stays: both
    hold the same content, because `target` is named by what it is made from.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: Path, content: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part of it."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        # mkstemp makes the file private; a result is as readable as any file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def check_writable(path: Path) -> None:
    """Raise OSError, naming the path, unless `write_whole` can make this file.

    It tries: permissions do not tell of read-only and virtual file systems.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = path.absolute().parent
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=folder)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    os.unlink(scratch)
