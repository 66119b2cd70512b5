"""Long texts to run models on, by name, and their tokens.

None is part of mpass: "code" is the running Python's own standard library; the books are in the
test data of Brotli's source archive, which pip fetches once into the user's cache.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpass.cache import cache_dir
from mpass.errors import MissingPackageError, OptionValueError, TextTooShortError, UnknownTextError

if TYPE_CHECKING:
    from torch import Tensor

ARCHIVE = "Brotli-1.1.0"
ARCHIVE_SHA256 = "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724"


@dataclass(frozen=True)
class Text:
    """A named text: what it is, under which licence, and how to read it."""

    name: str
    title: str
    license: str
    read: Callable[[], str]


def read_standard_library() -> str:
    """Sources of the public top-level modules of Python's standard library, in name order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)


def read_archived(member: str) -> str:
    """A book from Brotli's test data; raises MissingPackageError with the fetching command."""
    folder = cache_dir() / "texts"
    command = f"pip download --no-deps --no-binary :all: --dest {folder} brotli==1.1.0"
    path = folder / f"{ARCHIVE}.tar.gz"
    if not path.is_file():
        raise MissingPackageError("brotli==1.1.0 (source archive)", command, "not in the cache")
    if hashlib.sha256(path.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise MissingPackageError(
            "brotli==1.1.0 (source archive)", f"rm {path} && {command}", "damaged (wrong sha256)"
        )
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"{ARCHIVE}/tests/testdata/{member}")
        assert file is not None  # the hash says that it is there
        return file.read().decode("latin-1")


TEXTS = {
    text.name: text
    for text in (
        Text(
            "code",
            f"standard library of Python {platform.python_version()}",
            "PSF-2.0",
            read_standard_library,
        ),
        Text(
            "alice",
            "Alice's Adventures in Wonderland, Lewis Carroll",
            "public domain",
            lambda: read_archived("alice29.txt"),
        ),
        Text(
            "paradise",
            "Paradise Lost, John Milton",
            "public domain",
            lambda: read_archived("plrabn12.txt"),
        ),
    )
}
"""Texts by name; the first is the default and always there."""


def find_text(name_or_file: str | Path) -> Text:
    """A text by name, or one that reads a file of the user's; raises UnknownTextError."""
    if str(name_or_file) in TEXTS:
        return TEXTS[str(name_or_file)]
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise UnknownTextError(name_or_file, TEXTS)
    return Text(path.name, str(path), "the user's own file", lambda: read_file(path))


def read_file(path: Path) -> str:
    """Content of a UTF-8 file; raises UnknownTextError if it cannot be read as one."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownTextError(path, TEXTS, f"cannot be read: {error}") from error


def load_tokens(text: str, tokenizer: Any, length: int) -> Tensor:
    """The first `length` tokens of a text, without special tokens: int64 [1, length].

    Raises OptionValueError for a length below 1, TextTooShortError if the text has fewer tokens.
    """
    if length < 1:
        raise OptionValueError("length", length, "an int >= 1")
    import torch  # here, so that the command line's help needs no torch

    # Only as much of a long text is tokenized as is needed; 64 spare tokens keep the cut, where
    # tokens may differ from the whole text's, out of what is returned.
    chars, tokens = 4 * length + 256, list[int]()
    while len(tokens) < length + 64:
        tokens = tokenizer(text[:chars], add_special_tokens=False, verbose=False)["input_ids"]
        if chars >= len(text):
            break
        chars *= 2
    if len(tokens) < length:
        raise TextTooShortError(len(tokens), length)
    return torch.tensor([tokens[:length]])
