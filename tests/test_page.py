"""The page: its data, and what a real browser makes of it."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from mpass.lowering.sources import KernelSource

import mpass
from mpass.explanation import explain
from mpass.page import build_page
from mpass.page.build import page_data
from mpass.profiling import Profile, profile
from tests.browser import Browser, missing, open_browser
from tests.toys import Decoder

LAYERS, HEADS = 30, 9
ARTIFACTS = os.environ.get("MPASS_ARTIFACTS")
"""Folder that screenshots are kept in, for CI."""

needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "browser found")
KERNEL = KernelSource(
    "attention_64", "cpp", "int f() { return 1 < 2; } // </script>\n", (("O", "3"),)
)


@pytest.fixture(scope="module")
def smol() -> Profile:
    """A profile of a decoder with SmolLM2's 30 layers of 9 heads; layer 29 stays dense."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder(depth=LAYERS, dim=HEADS * 8, heads=HEADS, kv_heads=3).eval()
    layers = {3: [mpass.AShape(8, 64 * (1 + h)) for h in range(HEADS)], LAYERS - 1: "dense"}
    config = mpass.SparseConfig(mpass.AShape(16, 100), layers=layers)
    options = {"min_seq_len": 128, "dense_above": 2.0, "config": config}
    with torch.no_grad():
        done = profile(model, torch.randn(1, 512, HEADS * 8), options=options)
    torch._dynamo.reset()
    return dataclasses.replace(done, kernels=(KERNEL,))


class Elements(html.parser.HTMLParser):
    """Names of the elements of a page, and the addresses that it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_needs_no_other_file(smol):
    page = Elements(build_page(smol.explanation, smol))
    # A "</script>" inside of the data would end the element early and leave more of them.
    assert page.opened.count("script") == 3
    assert all(address.startswith(("#", "data:")) for address in page.addresses)


def test_data_has_every_layer_and_head(smol):
    rows = page_data(smol.explanation, smol)["rows"]
    assert [len(row["heads"]) for row in rows] == [HEADS] * LAYERS
    assert [row["measured"] for row in rows] == [True] * (LAYERS - 1) + [False]
    assert "every head" in rows[-1]["reason"]
    head, shown = smol.layers[3].heads[2], rows[3]["heads"][2]
    assert (shown["recall"], shown["pattern"]) == (
        pytest.approx(head.recall, abs=1e-6),
        head.pattern,
    )


def test_maps_unpack_to_what_was_measured(smol):
    layer, row = smol.layers[3], page_data(smol.explanation, smol)["rows"][3]
    cells = zlib.decompress(base64.b64decode(row["maps"]))
    shape = (HEADS, row["side"], row["side"])
    values = torch.frombuffer(bytearray(cells), dtype=torch.uint8).view(shape)
    assert torch.equal(values >> 4, layer.computed)
    assert torch.equal(values & 15, layer.exact)


def test_explanation_alone_makes_a_page():
    torch._dynamo.reset()
    with torch.no_grad():
        explanation = explain(
            Decoder(depth=2).eval(), torch.randn(1, 100, 32), options={"min_seq_len": 128}
        )
    data = page_data(explanation)
    assert data["rows"][1]["heads"][3]["recall"] is None
    assert "sparse from 128 on" in data["rows"][1]["reason"]
    assert json.dumps(data) is not None
    assert "Decoder" in build_page(explanation)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def load_seconds(browser: Browser, path: Path) -> float:
    """Seconds from navigation to the end of the page's scripts and its first head drawn."""
    browser.open(path)
    browser.wait("return document.querySelectorAll('#head canvas').length == 2")
    timing = "const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd"
    return browser.wait(timing) / 1000


CORNERS = """
const canvas = document.querySelector(`#head canvas[data-kind=${arguments[0]}]`);
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
return [canvas.width, pixels[0], pixels[4 * canvas.width - 4]];
"""
"""Width of a head's map, and the red of its first and last cell of the top row."""


@needs_browser
def test_browser_shows_layers_heads_and_themes_without_errors(smol, browser, tmp_path):
    smol.save(tmp_path / "page.html")
    browser.console(), browser.requests()
    load_seconds(browser, tmp_path / "page.html")
    label = "return document.getElementById('map').getAttribute('aria-label')"
    assert browser.run(label) == f"{LAYERS} layers by {HEADS} heads"
    count = "return document.querySelectorAll('#graph-%s .box.attention').length"
    assert browser.run(count % "before") == browser.run(count % "after") == LAYERS
    sparse = "return document.querySelectorAll('#graph-after .box.sparse').length"
    assert browser.run(sparse) == LAYERS - 1

    browser.click("#map", 10, 5)
    browser.wait("return document.querySelector('#head h3').textContent != 'Layer 0, head 0'")
    title = browser.run("return document.querySelector('#head h3').textContent")
    layer, head = (int(word) for word in title.replace(",", "").split() if word.isdecimal())
    assert 10 <= layer <= 20 and 2 <= head <= 6
    facts = browser.run("return document.querySelector('#head dl').textContent")
    assert f"{100 * smol.layers[layer].heads[head].recall:.1f}%" in facts
    dark = "const c = document.querySelector('#head canvas[data-kind=%s]'), p = c.getContext('2d')"
    dark += (
        ".getImageData(0, 0, c.width, c.height).data; return [c.width, p[0], p[4 * c.width - 4]]"
    )
    for kind in ("computed", "exact"):
        width, first, corner = browser.run(dark % kind)
        assert width == smol.layers[layer].computed.shape[-1]
        # The first block sees itself, and nothing sees the last key first.
        assert first < corner

    background = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    if ARTIFACTS:
        browser.run("scrollTo(0, 0)")
        browser.screenshot(Path(ARTIFACTS) / "page-light.png")
    browser.click("#theme")
    assert browser.run(background) != before
    if ARTIFACTS:
        browser.run("scrollTo(0, 0)")
        browser.screenshot(Path(ARTIFACTS) / "page-dark.png")
    assert browser.console() == []
    schemes = {address.split(":")[0] for address in browser.requests()}
    assert "file" in schemes
    assert not schemes & {"http", "https", "ws", "wss"}


@needs_browser
def test_click_on_an_attention_shows_source_and_proof(smol, browser, tmp_path):
    smol.save(tmp_path / "page.html")
    load_seconds(browser, tmp_path / "page.html")
    browser.click("#graph-before .box.attention")
    facts = browser.wait("return document.getElementById('site').textContent")
    assert "toys.py:" in facts
    assert "is_causal=True: k <= q" in facts
    transform = "return document.querySelector('#graph-before > g').getAttribute('transform')"
    before = browser.run(transform)
    browser.run(
        "document.getElementById('graph-before').dispatchEvent(new WheelEvent('wheel', "
        "{deltaY: 200, clientX: 200, clientY: 200, bubbles: true, cancelable: true}))"
    )
    assert browser.run(transform) != before


@needs_browser
def test_kernel_source_is_highlighted_and_escaped(smol, browser, tmp_path):
    smol.save(tmp_path / "page.html")
    load_seconds(browser, tmp_path / "page.html")
    assert KERNEL.source.strip() in browser.run(
        "return document.getElementById('kernel').innerText"
    )
    assert browser.run("return document.querySelectorAll('#kernel span').length") > 3
    assert browser.run("return document.getElementById('kernel-details').textContent") == "O: 3"


def enlarged(smol: Profile, layers: int, heads: int, side: int) -> Profile:
    """The profile with as many layers and heads as a large model, and maps that do not compress."""
    generator = torch.Generator().manual_seed(0)

    def maps():
        shape = (heads, side, side)
        return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)

    layer = smol.layers[0]
    many = tuple(
        dataclasses.replace(layer.heads[0], head=head, recall=head / heads) for head in range(heads)
    )
    graph = smol.explanation.graphs[0]
    site = dataclasses.replace(
        graph.sites[0], num_heads=heads, patterns=graph.sites[0].patterns[:1] * heads
    )
    graph = dataclasses.replace(
        graph,
        sites=tuple(dataclasses.replace(site, layer=i) for i in range(layers)),
        details=graph.details[:1] * layers,
        costs=graph.costs[:1] * layers,
    )
    return dataclasses.replace(
        smol,
        explanation=dataclasses.replace(smol.explanation, graphs=(graph,)),
        layers=tuple(
            dataclasses.replace(layer, layer=i, heads=many, computed=maps(), exact=maps())
            for i in range(layers)
        ),
    )


@needs_browser
def test_page_of_8k_tokens_is_small_and_loads_fast(smol, browser, tmp_path):
    path = tmp_path / "page.html"
    enlarged(smol, LAYERS, HEADS, 64).save(path)
    assert path.stat().st_size < 5e6
    assert load_seconds(browser, path) < 2.0


@needs_browser
def test_page_of_80_layers_and_64_heads_works(smol, browser, tmp_path):
    enlarged(smol, 80, 64, 32).save(tmp_path / "page.html")
    load_seconds(browser, tmp_path / "page.html")
    browser.click("#map", 0, 0)
    browser.wait("return document.querySelector('#head h3').textContent != 'Layer 0, head 0'")
    drawn = browser.run("const t = performance.now(); drawMap(); return performance.now() - t")
    assert drawn < 200
    assert browser.console() == []
