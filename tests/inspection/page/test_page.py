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

import mpass
from mpass.inspection.draw import draw_pattern
from mpass.inspection.explanation import explain
from mpass.inspection.outline import Outline
from mpass.inspection.page import build_page
from mpass.inspection.page.build import page_data
from mpass.inspection.profiling import Profile, profile
from mpass.lowering.kernel_sources import KernelSource
from tests.helpers.browser import Browser, missing, open_browser
from tests.helpers.requirements import needs_smollm2
from tests.helpers.rotation import on_its_day
from tests.helpers.toys import Decoder

LAYERS, HEADS = 30, 9
SMOLLM2_TOKENS = 2048
LARGEST_PAGE = 5e6
"""Bytes of a page, whatever the size of its model."""

TOKENS = tuple("\n" if i % 17 == 0 else f" w{i}" for i in range(512))

ARTIFACTS = os.environ.get("MPASS_ARTIFACTS")
"""Folder that screenshots are kept in, for CI."""

needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "browser found")
KERNEL = KernelSource(
    "attention_64", "cpp", "int f() { return 1 < 2; } // </script>\n", (("O", "3"),)
)


pytestmark = pytest.mark.xdist_group("page")


@pytest.fixture(scope="module")
def smol() -> Profile:
    """A profile of a decoder with SmolLM2's 30 layers of 9 heads; layer 29 stays dense."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Decoder(depth=LAYERS, dim=HEADS * 8, heads=HEADS, kv_heads=3).eval()
    layers = {3: [mpass.AShape(8, 64 * (1 + h)) for h in range(HEADS)], LAYERS - 1: "dense"}
    config = mpass.SparseConfig(mpass.AShape(16, 100), layers=layers)
    options = {"min_seq_len": 128, "dense_above": 2.0, "config": config}
    about = {"model": "a toy <b>", "prompt": "512 tokens of noise"}
    with torch.no_grad():
        prompt = torch.randn(1, 512, HEADS * 8)
        done = profile(model, prompt, options=options, tokens=TOKENS, about=about)
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


def fastest_load(browser: Browser, path: Path, below: float) -> float:
    """The least seconds of a few loads, the first below a bound: other work takes the CPU too."""
    fastest = float("inf")
    for _ in range(8):
        fastest = min(fastest, load_seconds(browser, path))
        if fastest < below:
            break
    return fastest


def use_page(browser: Browser, path: Path, done: Profile, sparse: int, picture: str) -> None:
    """Look at a page as a user does, and check what it shows.

    sparse: sparse attentions that it must show; picture: name of the screenshots kept in CI.
    """
    layers, heads = len(done.explanation.sites), done.explanation.sites[0].num_heads
    browser.console(), browser.requests()
    load_seconds(browser, path)
    label = "return document.getElementById('map').getAttribute('aria-label')"
    assert browser.run(label) == f"{layers} layers by {heads} heads"
    count = "return document.querySelectorAll('#graph-%s .box.attention').length"
    assert browser.run(count % "before") == browser.run(count % "after") == layers
    shown = "return document.querySelectorAll('#graph-after .box.sparse').length"
    assert browser.run(shown) == sparse

    browser.click("#map", 10, 5)
    browser.wait("return document.querySelector('#head h3').textContent != 'Layer 0, head 0'")
    title = browser.run("return document.querySelector('#head h3').textContent")
    layer, head = (int(word) for word in title.replace(",", "").split() if word.isdecimal())
    assert layers // 3 <= layer <= 2 * layers // 3 and 2 <= head <= heads - 2
    facts = browser.run("return document.querySelector('#head dl').textContent")
    assert f"{100 * done.layers[layer].heads[head].recall:.1f}%" in facts
    for kind in ("computed", "exact"):
        width, first, corner = browser.run(CORNERS, kind)
        assert width == browser.run("return data.rows[arguments[0]].side", layer)
        # The first block sees itself, and nothing sees the last key first.
        assert first < corner

    background = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    keep_screenshot(browser, f"{picture}-light.png")
    browser.click("#theme")
    assert browser.run(background) != before
    keep_screenshot(browser, f"{picture}-dark.png")
    assert browser.console() == []
    schemes = {address.split(":")[0] for address in browser.requests()}
    assert "file" in schemes
    assert not schemes & {"http", "https", "ws", "wss"}


def keep_screenshot(browser: Browser, name: str) -> None:
    """The top of the page as it is now, in the folder of CI's artifacts if there is one."""
    if ARTIFACTS:
        browser.run("showTip({}, ''); scrollTo(0, 0)")
        Path(ARTIFACTS).mkdir(parents=True, exist_ok=True)
        browser.screenshot(Path(ARTIFACTS) / name)


@needs_browser
def test_browser_shows_layers_heads_and_themes_without_errors(smol, browser, tmp_path):
    smol.save(tmp_path / "page.html")
    use_page(browser, tmp_path / "page.html", smol, LAYERS - 1, "page")


@needs_browser
@needs_smollm2
@on_its_day("page")
def test_page_of_smollm2_is_small_fast_and_complete(browser, tmp_path):
    from mpass.models.load import load_model
    from mpass.models.texts import find_text, load_tokens

    torch._dynamo.reset()
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    tokens = load_tokens(find_text("code").read(), tokenizer, SMOLLM2_TOKENS)
    inputs = {"input_ids": tokens, "use_cache": True}
    with torch.inference_mode():
        done = profile(model.get_decoder(), inputs, max_query_blocks=32)
    torch._dynamo.reset()
    assert len(done.layers) == LAYERS
    path = Path(ARTIFACTS or tmp_path) / "smollm2.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    done.save(path)
    assert path.stat().st_size < 5e6
    use_page(browser, path, done, LAYERS, "smollm2")
    assert fastest_load(browser, path, below=2.0) < 2.0


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


def enlarged(smol: Profile, layers: int, heads: int, side: int, tokens: int) -> Profile:
    """The profile with as many layers and heads as a large model, and maps as heads have them.

    Every map is another prompt's, and a tenth of its cells is random: it compresses no better
    than a measured one.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = mpass.VerticalSlash(1000, 1024)
    drawn = [draw_pattern(pattern, num_tokens=4096, resolution=side, seed=i) for i in range(4)]

    def maps(kind: str):
        chosen = torch.randint(len(drawn), (heads,), generator=generator).tolist()
        values = torch.stack([getattr(drawn[i], kind) for i in chosen])
        noise = torch.randint(0, 16, values.shape, generator=generator, dtype=torch.uint8)
        return torch.where(torch.rand(values.shape, generator=generator) < 0.1, noise, values)

    layer = smol.layers[0]
    looks, every = layer.looks, torch.zeros(heads, dtype=torch.int64)
    shown = {
        field.name: getattr(looks, field.name)[every]
        for field in dataclasses.fields(looks)
        if field.name not in ("queries", "seen")
    }
    looks = dataclasses.replace(looks, **shown)
    many = tuple(
        dataclasses.replace(layer.heads[0], head=head, recall=head / heads) for head in range(heads)
    )
    graph = smol.explanation.graphs[0]
    site = dataclasses.replace(
        graph.sites[0], num_heads=heads, patterns=graph.sites[0].patterns[:1] * heads
    )
    boxes = graph.outline_after.boxes
    attention = next(box for box in boxes if box.kind == "attention")
    boxes = [dataclasses.replace(attention, layer=i) for i in range(layers)]
    drawing = Outline(tuple(boxes), tuple((i, i + 1) for i in range(layers - 1)))
    graph = dataclasses.replace(
        graph,
        sites=tuple(dataclasses.replace(site, layer=i) for i in range(layers)),
        details=graph.details[:1] * layers,
        costs=graph.costs[:1] * layers,
        outline_before=drawing,
        outline_after=drawing,
    )
    return dataclasses.replace(
        smol,
        explanation=dataclasses.replace(smol.explanation, graphs=(graph,)),
        layers=tuple(
            dataclasses.replace(
                layer,
                layer=i,
                looks=looks,
                heads=many,
                num_queries=tokens,
                num_keys=tokens,
                computed=maps("computed"),
                exact=maps("exact"),
            )
            for i in range(layers)
        ),
    )


@needs_browser
def test_page_of_64_layers_and_32_heads_is_small_and_opens_fast(smol, browser, tmp_path):
    path = tmp_path / "page.html"
    enlarged(smol, 64, 32, 128, 131072).save(path)
    assert path.stat().st_size < LARGEST_PAGE
    assert fastest_load(browser, path, below=2.0) < 2.0


@needs_browser
@pytest.mark.slow
def test_page_of_80_layers_64_heads_and_128k_tokens_works(smol, browser, tmp_path):
    path = tmp_path / "page.html"
    large = enlarged(smol, 80, 64, 64, 131072)
    large.save(path)
    assert path.stat().st_size < LARGEST_PAGE
    use_page(browser, path, large, 80, "large")
    assert fastest_load(browser, path, below=5.0) < 5.0
    drawn = browser.run("const t = performance.now(); drawMap(); return performance.now() - t")
    assert drawn < 400
    begin = "window.since = performance.now(); chooseHead(79, 63).then(() => window.took = "
    browser.run(f"{begin}performance.now() - window.since)")
    assert browser.wait("return window.took") < 500
    axis = "return [...document.querySelectorAll('#head .axes text')].map((t) => t.textContent)"
    assert "128K" in browser.run(axis)
