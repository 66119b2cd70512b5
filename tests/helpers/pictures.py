"""Screenshots held against small accepted pictures; MPASS_ACCEPT=1 accepts what is shown now.

A browser makes both pictures small, so that letters are grey and fonts hardly count, and what is
compared are its pixels. No library for pictures is needed.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers.browser import Browser

WIDTH = 96
"""Pixels across of an accepted picture."""

MOST = 4.0
"""Largest mean difference of two pictures, in steps of 255. Other fonts make about 1."""

MOST_IN_A_PLACE = 40.0
"""Largest mean difference of a square of `PLACE` pixels."""

PLACE = 8

SMALL = """
const done = arguments[arguments.length - 1], [source, width] = arguments;
const image = new Image();
image.onload = () => {
  let from = image, w = image.width, h = image.height;
  const drawn = (across, down) => {
    const canvas = document.createElement("canvas");
    canvas.width = across; canvas.height = down;
    canvas.getContext("2d").drawImage(from, 0, 0, across, down);
    from = canvas; w = across; h = down;
  };
  while (w >= 2 * width) drawn(w >> 1, h >> 1);
  if (w != width) drawn(width, Math.round(h * width / w));
  const context = from.getContext ? from : (drawn(w, h), from);
  const pixels = context.getContext("2d").getImageData(0, 0, w, h).data;
  done([w, h, Array.from(pixels), context.toDataURL()]);
};
image.src = source;
"""
"""Halves a picture until it is small: each step is a mean of four pixels."""


def small(browser: Browser, picture: str) -> tuple[Tensor, str]:
    """A picture of a data: address made small: float [H, W, 3], and as a PNG."""
    body = {"script": SMALL, "args": [picture, WIDTH]}
    width, height, pixels, made = browser.call("POST", f"{browser.session}/execute/async", body)
    return torch.tensor(pixels, dtype=torch.float32).view(height, width, 4)[..., :3], made


def distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Mean difference of two pictures, and that of the place where they differ most."""
    if left.shape != right.shape:
        return float("inf"), float("inf")
    apart = (left - right).abs().mean(-1)
    places = torch.nn.functional.avg_pool2d(apart[None, None], PLACE, PLACE, ceil_mode=True)
    return float(apart.mean()), float(places.max())


def shot(browser: Browser) -> Tensor:
    """The screen as it is now, small."""
    return small(browser, screen(browser))[0]


def screen(browser: Browser) -> str:
    """The screen as it is now: an address of its data."""
    return address(base64.b64decode(browser.call("GET", f"{browser.session}/screenshot")))


def address(png: bytes) -> str:
    """A picture as an address that a browser loads."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def difference(browser: Browser, accepted: Path) -> str:
    """How the screen differs from an accepted picture, "" where it does not.

    The page stays open; an empty one would lose its state. What was seen is kept beside CI's
    artifacts.
    """
    now, made = small(browser, screen(browser))
    png = base64.b64decode(made.partition(",")[2])
    if os.environ.get("MPASS_ACCEPT") == "1":
        accepted.parent.mkdir(parents=True, exist_ok=True)
        accepted.write_bytes(png)
    then, _ = small(browser, address(accepted.read_bytes()))
    mean, place = distance(now, then)
    if mean <= MOST and place <= MOST_IN_A_PLACE:
        return ""
    if folder := os.environ.get("MPASS_ARTIFACTS"):
        (Path(folder) / f"differs-{accepted.name}").write_bytes(png)
    found = json.dumps({"mean": round(mean, 1), "place": round(place, 1)})
    return f"the screen is not {accepted.name}: {found}; MPASS_ACCEPT=1 accepts it"
