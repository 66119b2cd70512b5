"""The page as a researcher uses it: tokens, pins, search, two runs, files, narrow screens."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
import torch

import mpass
from mpass.inspection.explanation import explain
from mpass.inspection.profiling import Profile, profile
from tests.helpers.browser import Browser
from tests.helpers.toys import Decoder
from tests.inspection.page.test_page import TOKENS, browser, needs_browser

__all__ = ["browser"]
LAYERS, HEADS = 3, 4
NARROW = 360

pytestmark = [needs_browser, pytest.mark.xdist_group("page")]


def made(pattern, prompt="first") -> Profile:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder(depth=LAYERS, dim=32, heads=HEADS, kv_heads=2).eval()
    config = mpass.SparseConfig(pattern, layers={LAYERS - 1: "dense"})
    options = {"min_seq_len": 128, "dense_above": 2.0, "config": config}
    about = {"model": "toy", "prompt": prompt}
    with torch.no_grad():
        done = profile(model, torch.randn(1, 512, 32), options=options, tokens=TOKENS, about=about)
    torch._dynamo.reset()
    return dataclasses.replace(done, kernels=())


@pytest.fixture(scope="module")
def two() -> tuple[Profile, Profile]:
    return made(mpass.AShape(16, 100)), made(mpass.AShape(64, 300), "second")


@pytest.fixture(scope="module")
def pages(two, tmp_path_factory):
    """Pages of one run, of two, of no attention, and of one that stays dense."""
    folder = tmp_path_factory.mktemp("pages")
    first, second = two
    first.save(folder / "one.html")
    first.save(folder / "two.html", beside=second)
    torch._dynamo.reset()
    explain(torch.nn.Linear(4, 4), torch.zeros(1, 4)).save(folder / "none.html")
    with torch.no_grad():
        explain(Decoder(depth=1).eval(), torch.randn(1, 64, 32)).save(folder / "dense.html")
    torch._dynamo.reset()
    return folder


def show(browser: Browser, path, view="") -> None:
    """Open a page anew, at a view."""
    browser.call("POST", f"{browser.session}/url", {"url": "about:blank"})
    browser.call("POST", f"{browser.session}/url", {"url": path.absolute().as_uri() + view})
    browser.wait("return document.readyState == 'complete'")


def text_of(browser, selector):
    return browser.run("return document.querySelector(arguments[0]).textContent", selector)


def change(browser, selector, value, event="change"):
    browser.run(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event(arguments[2]))",
        selector,
        value,
        event,
    )


def press(browser, selector, key):
    browser.run(
        "const e = document.querySelector(arguments[0]); e.focus(); e.dispatchEvent("
        "new KeyboardEvent('keydown', {key: arguments[1], bubbles: true, cancelable: true}))",
        selector,
        key,
    )


def width(browser: Browser, pixels: int, height: int = 900) -> None:
    """Make the screen this wide; 0 gives the window its own size back."""
    metrics = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": False}
    command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
    if not pixels:
        command = {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}}
    browser.call("POST", f"{browser.session}/goog/cdp/execute", command)


def test_the_page_says_what_was_run(browser, pages):
    show(browser, pages / "one.html")
    said = text_of(browser, "#provenance-box")
    for words in (
        "toy",
        "first",
        "float32",
        "config of a_shape(16, 100)",
        torch.__version__,
        "UTC",
    ):
        assert words in said


def test_a_query_token_shows_its_keys_weights_and_text(browser, pages, two):
    show(browser, pages / "one.html")
    browser.wait("return document.querySelectorAll('#query-keys tr').length > 2")
    browser.run("return chooseHead(1, 2)")
    change(browser, "#query", 3)
    looks = two[0].layers[1].looks
    position = looks.queries[3]
    browser.wait(f"return document.querySelector('#query-text mark').textContent == ' w{position}'")
    count, seen = int(looks.count[2, 3]), int(looks.seen[3])
    assert f"takes {count} of {seen} keys" in text_of(browser, "#query-facts")
    cells = browser.run(
        "return [...document.querySelectorAll('#query-keys tr')].slice(1)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert [int(row[0]) for row in cells] == looks.keys[2, 3].tolist()
    shown = [float(row[1].strip(" %")) for row in cells]
    assert shown == pytest.approx([100 * w for w in looks.weights[2, 3].tolist()], abs=0.011)
    assert [row[2] == "taken" for row in cells] == looks.taken[2, 3].tolist()
    assert TOKENS[int(cells[0][0])].strip() in cells[0][3]
    assert browser.run("return document.querySelectorAll('#query-map canvas').length") == 2


@pytest.mark.parametrize(
    ("typed", "heads"),
    [
        ("1.3", [(1, 3)]),
        ("layer 0", [(0, h) for h in range(HEADS)]),
        ("recall<0%", []),
        ("density > 0.01", [(r, h) for r in range(LAYERS - 1) for h in range(HEADS)]),
        ("a_shape", [(r, h) for r in range(LAYERS - 1) for h in range(HEADS)]),
        ("keeps every head", [(LAYERS - 1, h) for h in range(HEADS)]),
    ],
)
def test_heads_are_found_by_place_figure_and_word(browser, pages, typed, heads):
    show(browser, pages / "one.html")
    change(browser, "#find", typed, "input")
    assert [tuple(at) for at in browser.run("return found")] == heads
    assert f"{len(heads)} head" in text_of(browser, "#found")


def test_pins_are_set_by_key_and_an_address_restores_the_view(browser, pages):
    show(browser, pages / "one.html")
    press(browser, "#map", "ArrowDown")
    press(browser, "#map", "ArrowRight")
    press(browser, "#map", "Enter")
    change(browser, "#metric", "error")
    change(browser, "#query", 2)
    change(browser, "#find", "a_shape", "input")
    browser.click("#theme")
    theme = browser.run("return document.documentElement.dataset.theme")
    browser.wait("return document.querySelectorAll('#pins .card').length == 1")
    place = browser.run("return location.hash")
    show(browser, pages / "one.html", place)
    browser.wait("return document.querySelectorAll('#pins .card canvas').length == 2")
    browser.wait("return document.getElementById('query').value == 2")
    assert text_of(browser, "#head h3") == "Layer 1, head 1"
    assert browser.run("return document.getElementById('metric').value") == "error"
    assert browser.run("return document.getElementById('find').value") == "a_shape"
    assert browser.run("return document.documentElement.dataset.theme") == theme
    assert browser.run("return location.hash") == place
    browser.click("#pins .card button:nth-of-type(2)")
    browser.wait("return document.querySelectorAll('#pins .card').length == 0")


@pytest.mark.parametrize("view", ["#row=99&head=-3", "#query=x&pins=9.9,a.b", "#metric=no&run=7"])
def test_an_address_that_says_nothing_sensible_does_no_harm(browser, pages, view):
    show(browser, pages / "one.html", view)
    browser.wait("return document.querySelectorAll('#head h3').length == 1")
    assert browser.console() == []


def test_planned_and_run_dense_and_sparse_stand_beside_each_other(browser, pages, two):
    show(browser, pages / "one.html")
    rows = browser.run(
        "return [...document.querySelectorAll('#layer-table tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert rows[0][3:] == [
        *("density", "lost mass", "output error"),
        *("sparse time", "dense time", "times dense"),
    ]
    layer = two[0].layers[0]
    assert rows[1][4] == f"{100 * (1 - layer.planned.recall):.1f}%"
    assert rows[1][5] == f"{100 * layer.output_error:.1f}%"
    assert rows[1][8].endswith("x")
    assert browser.run("return document.querySelectorAll('.dense-mark').length") == LAYERS - 1


def test_two_runs_stand_beside_each_other(browser, pages, two):
    show(browser, pages / "two.html")
    browser.wait("return document.querySelectorAll('#head canvas').length == 4")
    rows = browser.run("return document.querySelectorAll('#compare-table tr').length")
    assert rows == LAYERS + 1
    assert "A: first | B: second" in text_of(browser, "#compare-facts")
    recall = browser.run(
        "return [page.runs[0], page.runs[1]].map((r) => r.rows[0].heads[0].recall)"
    )
    assert recall == pytest.approx([each.layers[0].heads[0].recall for each in two], abs=1e-6)
    change(browser, "#run", 1)
    assert "second" in text_of(browser, "#provenance-box")
    assert "run=1" in browser.run("return location.hash")
    assert browser.console() == []


def test_numbers_are_saved_as_csv_and_json_and_the_view_as_a_picture(browser, pages, two):
    show(browser, pages / "two.html")
    browser.wait("return document.querySelectorAll('#head canvas').length == 4")
    lines = list(csv.DictReader(io.StringIO(browser.run("return asCsv()"))))
    assert len(lines) == 2 * LAYERS * HEADS
    head = two[0].layers[0].heads[1]
    assert float(lines[1]["lost_mass"]) == pytest.approx(head.lost_mass, abs=1e-6)
    assert float(lines[1]["output_error"]) == pytest.approx(head.output_error, abs=1e-6)
    assert lines[-1]["why_dense"].startswith("the config keeps every head")
    saved = json.loads(browser.run("return asJson()"))
    assert saved["provenance"][0]["prompt"] == "first" and len(saved["heads"]) == len(lines)
    drawn = browser.run("const p = picture(); return p.toDataURL().length")
    assert drawn > 2000
    names = "window.names = []; window.download = (name) => names.push(name);"
    browser.run(f"{names} download = window.download")
    for button in ("#save-csv", "#save-json", "#save-picture"):
        browser.click(button)
    browser.wait("return names.length == 3")
    assert browser.console() == []


@pytest.mark.parametrize("name", ["one", "two", "none", "dense"])
def test_a_narrow_screen_never_scrolls_sideways(browser, pages, name):
    width(browser, NARROW)
    try:
        show(browser, pages / f"{name}.html")
        browser.wait("return document.getElementById('tiles').childElementCount > 0")
        browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
        room = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert room[0] <= room[1] == NARROW
    finally:
        width(browser, 0)


@pytest.mark.parametrize("name", ["one", "two", "none", "dense"])
def test_links_lead_somewhere_and_all_controls_have_names(browser, pages, name):
    show(browser, pages / f"{name}.html")
    dead = browser.run(
        "return [...document.querySelectorAll('nav a:not([hidden])')].filter((link) => "
        "document.querySelector(link.getAttribute('href')).hidden).length"
    )
    assert dead == 0
    nameless = browser.run(
        "const named = (e) => e.getAttribute('aria-label') || e.textContent.trim() || "
        "(e.labels && e.labels.length); return [...document.querySelectorAll("
        "'button, select, input, canvas, [role=img], [role=button]')]"
        ".filter((e) => !e.closest('[hidden]') && !named(e)).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    assert browser.console() == []


def test_graphs_and_maps_are_read_by_keys_alone(browser, pages):
    show(browser, pages / "one.html")
    browser.wait("return document.querySelectorAll('#head canvas').length == 2")
    press(browser, "#graph-before .box.attention[role=button]", "Enter")
    assert "toys.py:" in text_of(browser, "#site")
    browser.wait("return data.unpackedTokens")
    press(browser, "#head canvas[data-kind=computed]", "ArrowUp")
    told = text_of(browser, "#live")
    position = int(told.partition("queries from ")[2].partition(":")[0])
    assert "of the keys" in told and f"“{TOKENS[position].strip()}" in told
    assert f"keys from 0: “{'⏎'}{TOKENS[1]}" in told
    press(browser, "#map", "ArrowDown")
    browser.wait("return document.getElementById('live').textContent.startsWith('layer 1, head 0')")
