"""The page by picture: small accepted screenshots, of small and large models, wide and narrow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import mpass
from mpass.inspection.explanation import explain
from mpass.inspection.profiling import Profile
from tests.helpers.browser import Browser
from tests.helpers.pictures import MOST, MOST_IN_A_PLACE, difference, distance, shot
from tests.helpers.toys import Decoder
from tests.inspection.page.test_page import browser, enlarged, needs_browser
from tests.inspection.page.test_page_use import NARROW, made, show, width

__all__ = ["browser"]
PICTURES = Path(__file__).parent / "pictures"

pytestmark = [needs_browser, pytest.mark.xdist_group("page")]


def timeless(done: Profile) -> Profile:
    """The profile with the same times and the same place whenever and wherever it is made."""
    layers = tuple(
        dataclasses.replace(
            layer, index_seconds=0.01, attention_seconds=0.03, dense_seconds=0.1 + 0.01 * i
        )
        for i, layer in enumerate(done.layers)
    )
    seconds = {"index": 0.02, "attention": 0.06, "dense attention": 0.1, "rest": 0.2}
    graphs = tuple(
        dataclasses.replace(
            graph, sites=tuple(dataclasses.replace(s, source="toys.py:1") for s in graph.sites)
        )
        for graph in done.explanation.graphs
    )
    explanation = dataclasses.replace(done.explanation, graphs=graphs)
    return dataclasses.replace(done, explanation=explanation, layers=layers, seconds=seconds)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a small model, of two runs, of one layer, a large model, and nothing sparse."""
    folder = tmp_path_factory.mktemp("pictures")
    first = timeless(made(mpass.AShape(16, 100)))
    second = timeless(made(mpass.AShape(64, 300), "second"))
    first.save(folder / "small.html")
    first.save(folder / "two.html", beside=second)
    timeless(enlarged(first, 1, 1, 32, 4096)).save(folder / "layer.html")
    timeless(enlarged(first, 64, 32, 64, 131072)).save(folder / "large.html")
    torch._dynamo.reset()
    with torch.no_grad():
        explain(Decoder(depth=1).eval(), torch.randn(1, 64, 32)).save(folder / "dense.html")
    torch._dynamo.reset()
    return folder


@pytest.fixture(autouse=True)
def tall(browser):
    """A screen that shows the maps of heads whole."""
    width(browser, 1400, 1500)
    yield
    width(browser, 0)


def look(browser: Browser, page: Path, view: str = "theme=light") -> None:
    """Open a page at a view, until its maps are drawn."""
    show(browser, page, f"#{view}")
    browser.wait("return document.getElementById('tiles').childElementCount > 0")
    maps = "document.querySelectorAll('#head canvas').length"
    browser.wait(f"return {maps} >= 2 || !page.runs[0].profiled")


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("small", "theme=light"),
        ("small", "theme=dark"),
        ("two", "theme=light"),
        ("layer", "theme=light"),
        ("large", "theme=light&row=40&head=20&metric=recall"),
        ("dense", "theme=light"),
    ],
)
def test_a_page_looks_as_accepted(browser, pages, name, view):
    look(browser, pages / f"{name}.html", view)
    kind = "-dark" * ("dark" in view)
    assert not (fault := difference(browser, PICTURES / f"{name}{kind}.png")), fault


def test_a_narrow_page_looks_as_accepted(browser, pages):
    width(browser, NARROW)
    look(browser, pages / "small.html")
    browser.run("document.getElementById('heads').scrollIntoView()")
    assert not (fault := difference(browser, PICTURES / "narrow.png")), fault


@pytest.mark.parametrize(
    "fault",
    [
        "document.getElementById('map').remove()",
        "document.querySelector('#head canvas').remove()",
        "document.getElementById('tiles').remove()",
        "document.body.style.background = '#c33'",
    ],
)
def test_a_picture_tells_what_is_missing(browser, pages, fault):
    look(browser, pages / "small.html")
    whole = shot(browser)
    browser.run(fault)
    mean, place = distance(whole, shot(browser))
    assert mean > MOST or place > MOST_IN_A_PLACE


def test_no_two_pages_look_alike(browser, pages):
    shots = []
    for name in ("small", "two", "layer", "large", "dense"):
        look(browser, pages / f"{name}.html")
        shots.append(shot(browser))
    for i, left in enumerate(shots):
        for right in shots[:i]:
            mean, place = distance(left, right)
            assert mean > MOST or place > MOST_IN_A_PLACE
