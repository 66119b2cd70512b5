"""Hooks of `make docs`: pages of the repository's root, links to sources, and the API reference.

In the repository links lead to files. On the site a link to another page stays a link, and one to
a source file becomes its name: the site is also read without the repository.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Pages of the repository's root that the site has, too."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add pages of the root, pictures of benchmarks, notebooks that ran, and the API reference."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.svg")):
        uri = f"results/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    for notebook in sorted((ROOT / "build" / "notebooks").glob("*.md")):
        files.append(File.generated(config, notebook.name, abs_src_path=str(notebook)))
    files.append(File.generated(config, "api.md", content=api_page()))
    return files


def api_page() -> str:
    """Every public name of mpass, by the module that defines it."""
    tree = ast.parse((ROOT / "mpass" / "__init__.py").read_text(encoding="utf-8"))
    exports: dict[str, str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS"
    )
    parts = ["# API reference", "", "All of these are attributes of `mpass`.", ""]
    for name, module in sorted(exports.items(), key=lambda item: item[0].lower()):
        parts += [f"## mpass.{name}", "", f"::: {module}.{name}", "    options:"]
        parts += ["      show_root_heading: false", "      show_source: false", ""]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as the site has them; code blocks are left alone."""
    own = source_of(page.file.src_uri)
    parts = CODE.split(markdown)
    return "".join(
        part if part.startswith("```") else LINK.sub(lambda found: linked(found, own, page), part)
        for part in parts
    )


def source_of(uri: str) -> Path:
    """The file of the repository that a page is made of."""
    return ROOT / uri if uri in PAGES else ROOT / "docs" / uri


def linked(found: re.Match[str], own: Path, page: Any) -> str:
    """One link, or the name of what it leads to in the repository."""
    mark, text, target = found.groups()
    place, _, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not place:
        return found.group(0)
    file = Path(os.path.normpath(own.parent / place))
    uri = uri_of(file)
    if uri is None:
        if not file.exists():
            return found.group(0)  # --strict tells of it
        return text if text.startswith("`") or "/" not in text else f"`{text}`"
    relative = os.path.relpath(uri, os.path.dirname(page.file.src_uri) or ".")
    return f"{mark}[{text}]({relative}{'#' * bool(anchor)}{anchor})"


def uri_of(file: Path) -> str | None:
    """Where the site has a file; None where it does not."""
    if file.parent == ROOT and file.name in PAGES:
        return file.name
    if file == ROOT / "README.md":
        return "index.md"
    if file.parent == ROOT / "benchmarks" / "results" and file.suffix == ".svg":
        return f"results/{file.name}"
    if file.parent == ROOT / "examples" and file.suffix == ".ipynb":
        return f"{file.stem}.md"  # what it printed
    docs = ROOT / "docs"
    if file.is_relative_to(docs) and file.is_file():
        return file.relative_to(docs).as_posix()
    return None
