"""A headless Chromium driven through chromedriver's WebDriver protocol, with urllib alone.

`python -m tests.helpers.browser PAGE.html PICTURE.png LAYER HEAD` takes the picture in README: the
top of the page of a profile, with a head chosen.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,1000",
]


def missing() -> str:
    """Which program is not installed; "" if both are."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(names)} not installed (Debian: chromium chromium-driver)" * bool(names)


class Browser:
    """One browser session."""

    def __init__(self, address: str, profile: Path) -> None:
        self.address = address
        options = {
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            "binary": shutil.which("chromium"),
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        made = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def open(self, path: Path) -> None:
        self.call("POST", f"{self.session}/url", {"url": path.absolute().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        body = {"script": script, "args": list(args)}
        return self.call("POST", f"{self.session}/execute/sync", body)

    def click(self, selector: str, x: int = 0, y: int = 0) -> None:
        """A real click, x and y pixels from the middle of an element."""
        found = self.call(
            "POST", f"{self.session}/element", {"using": "css selector", "value": selector}
        )
        self.run("arguments[0].scrollIntoView({block: 'center'})", found)
        move = {"type": "pointerMove", "duration": 0, "origin": found, "x": x, "y": y}
        steps = [move, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "actions": steps}
        self.call("POST", f"{self.session}/actions", {"actions": [pointer]})

    def wait(self, script: str, seconds: float = 20.0) -> Any:
        """The first truthy value of a script."""
        end = time.monotonic() + seconds
        while True:
            value = self.run(script)
            if value:
                return value
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def console(self) -> list[str]:
        """What the page wrote to the console since the last call, errors of loading included."""
        entries = self.call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def requests(self) -> list[str]:
        """Addresses that the browser asked for since the last call."""
        entries = self.call("POST", f"{self.session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [m for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]

    def screenshot(self, path: Path) -> None:
        picture = self.call("GET", f"{self.session}/screenshot")
        path.write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        self.call("DELETE", self.session)


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser with a new profile in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/status", timeout=1)
                break
            time.sleep(0.05)
        browser = Browser(address, folder)
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def main() -> None:
    page, picture, row, head = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder)) as browser:
        browser.open(Path(page))
        browser.wait("return document.querySelectorAll('#head canvas').length == 2")
        begin = "window.shown = false; chooseHead(arguments[0], arguments[1])"
        browser.run(f"{begin}.then(() => {{ window.shown = true; }})", int(row), int(head))
        browser.wait("return window.shown")
        browser.screenshot(Path(picture))


if __name__ == "__main__":
    main()
