"""The code in README.md and docs/: what it imports is there, and so is every name of mpass."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

import mpass
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


def test_there_is_code_to_look_at():
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS)
def test_imports_of_a_code_block_work(block):
    tree = ast.parse(block)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        for module in modules:
            if module.split(".")[0] != "mpass":
                pytest.importorskip(module.split(".")[0])
        exec(compile(ast.Module([node], []), "<block>", "exec"), {})


@pytest.mark.parametrize("block", BLOCKS)
def test_names_of_mpass_in_a_code_block_exist(block):
    used = {
        node.attr
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "mpass"
    }
    assert [name for name in used if not hasattr(mpass, name)] == []


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_of_a_page_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    places = {target.partition("#")[0] for target in LINK.findall(text) if "://" not in target}
    missing = [place for place in places if place and not (page.parent / place).exists()]
    assert missing == []


def test_every_page_is_in_the_index_or_linked_from_a_page_that_is():
    docs = ROOT / "docs"
    seen, waiting = set(), [docs / "index.md", ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        targets = LINK.findall(page.read_text(encoding="utf-8"))
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in targets]
    assert {page for page in docs.rglob("*.md")} <= seen


def test_every_page_but_parts_of_others_is_in_the_menu_of_the_site():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", menu, re.MULTILINE)
    made = {"api.md", *(f"{path.stem}.md" for path in (ROOT / "examples").glob("*.ipynb"))}
    root = {page for page in listed if page.isupper() or page[:-3].isupper()}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} | made == set(listed) - root
    assert all((ROOT / page).is_file() for page in root)


def test_citation_names_this_version_and_the_authors_of_the_licence():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mpass.__version__}\n" in citation
    authors = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["authors"]
    assert all(f"- name: {author['name']}\n" in citation for author in authors)
    (owner,) = re.findall(r"Copyright \(c\) \d+ (.*)", (ROOT / "LICENSE").read_text())
    assert owner == authors[0]["name"]
