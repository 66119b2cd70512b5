"""The pages of docs/patterns: what the code says of itself, with a picture each."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.pattern_pages import FOLDER, MEASURED, page_of, split_docstring
from mpass.patterns.base import parameter_kinds, registered_patterns

LARGEST_PICTURE = 40_000
OWN = sorted(
    name
    for name, cls in registered_patterns().items()
    if cls.__module__.startswith("mpass.patterns.")
)

PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))
"""Patterns with a page; a new pattern may come without one."""


def test_the_patterns_that_mpass_brings_have_pages() -> None:
    assert len(PAGES) >= 12


@pytest.mark.parametrize("name", PAGES)
def test_page_says_what_the_code_says(name: str) -> None:
    page = (FOLDER / f"{name}.md").read_text()
    kept = MEASURED + page.split(MEASURED, 1)[1].rstrip() if MEASURED in page else ""
    hint = "python benchmarks/pattern_pages.py writes it anew"
    assert page == page_of(registered_patterns()[name], kept), hint


@pytest.mark.parametrize("name", PAGES)
def test_picture_is_small_and_of_the_default_parameters(name: str) -> None:
    path = FOLDER / f"{name}.svg"
    assert path.stat().st_size < LARGEST_PICTURE
    texts = [text.text or "" for text in ElementTree.parse(path).getroot().iter() if text.text]
    caption = next(text for text in texts if " tokens: density " in text)
    assert caption.startswith(f"{registered_patterns()[name]()} at "), "pattern_pages.py --pictures"


def test_no_page_is_of_a_pattern_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} <= set(OWN)
    assert {path.stem for path in FOLDER.glob("*.svg")} <= set(OWN)


def test_every_parameter_of_a_page_has_a_meaning() -> None:
    for name in PAGES:
        cls = registered_patterns()[name]
        _, meanings = split_docstring(cls)
        assert list(meanings) == list(parameter_kinds(cls)), name
        assert all(meaning.endswith(".") for meaning in meanings.values()), name
