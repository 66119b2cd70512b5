"""What is being compiled now, told while it lasts: "kernels 2 of 3, Inductor, 14 s".

A first compile takes a minute, most of it in compilers that say nothing. Whoever builds a kernel or
runs another compiler says so here. After some seconds a terminal and a notebook get one line that
is rewritten until all is done and then goes away; a log file gets a line per kernel, because it
cannot take one back. A command that draws progress of its own shows the text instead (`show_by`).
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

AFTER = 3.0
"""Seconds of compiling before anything is said."""

EVERY = 0.5
"""Seconds between two looks at what is done."""

SWITCH = "MPASS_PROGRESS"
"""`MPASS_PROGRESS=0` in the environment: nothing is shown."""

Place = Literal["terminal", "notebook", "log"]


class Activity:
    """Kernels and compilers at work in this process; all methods may be called by any thread.

    A batch begins with the first of them and ends when none is left: numbers count a batch.
    """

    def __init__(self, after: float = AFTER) -> None:
        """after: seconds of compiling before anything is said; in a log, seconds of a kernel."""
        self.after = after
        self.lock = threading.Lock()
        self.own = threading.local()  # what this thread builds: a kernel within a kernel is one
        self.watcher: Callable[[str], None] | None = None
        self.kernels: dict[object, tuple[str, float]] = {}  # their names, and since when
        self.stages: list[str] = []  # other compilers
        self.over = threading.Event()  # of this batch
        self.finished, self.begun, self.length = 0, 0.0, 0
        self.told: set[object] = set()

    def expect(self, name: str) -> object:
        """A kernel that will be built, perhaps by another thread; to be given to `build`."""
        ticket = object()
        with self.lock:
            self.begin()
            self.kernels[ticket] = name, time.monotonic()
        return ticket

    @contextmanager
    def build(self, name: str, ticket: object | None = None) -> Iterator[None]:
        """A kernel is built in the block; `ticket` if it was expected."""
        if getattr(self.own, "building", False):
            yield
            return
        ticket = ticket or self.expect(name)
        self.own.building = True
        try:
            yield
        finally:
            self.own.building = False
            with self.lock:
                del self.kernels[ticket]
                self.finished += 1
                self.end()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Another compiler works in the block, such as Inductor."""
        with self.lock:
            self.begin()
            self.stages.append(name)
        try:
            yield
        finally:
            with self.lock:
                self.stages.remove(name)
                self.end()

    @contextmanager
    def show_by(self, watcher: Callable[[str], None]) -> Iterator[None]:
        """In the block `watcher` is given the text, "" when all is done, and no line is written."""
        before, self.watcher = self.watcher, watcher
        try:
            yield
        finally:
            self.watcher = before

    def text(self) -> str:
        """What is at work and since when; "" if nothing is."""
        if not self.kernels and not self.stages:
            return ""
        parts = []
        if total := self.finished + len(self.kernels):
            parts.append(f"kernels {self.finished} of {total}")
        parts += dict.fromkeys(self.stages)
        return ", ".join([*parts, f"{time.monotonic() - self.begun:.0f} s"])

    def begin(self) -> None:
        """A batch begins, if none has: a thread looks on until it ends."""
        if self.kernels or self.stages:
            return
        self.finished, self.begun, self.over = 0, time.monotonic(), threading.Event()
        self.told.clear()
        if os.environ.get(SWITCH) != "0":
            looker = threading.Thread(target=self.look_on, args=[self.over], daemon=True)
            looker.start()

    def end(self) -> None:
        """The batch ends if nothing is left: its line goes away."""
        if self.kernels or self.stages:
            return
        self.over.set()
        if self.length:
            self.say("")

    def look_on(self, over: threading.Event) -> None:
        """Tell what is at work every now and then, while a batch lasts."""
        wait = self.after
        while not over.wait(wait):
            with self.lock:
                if not over.is_set():
                    self.say(self.text())
            wait = EVERY

    def say(self, text: str) -> None:
        """Show the text where it belongs; what cannot be written is nobody's failure."""
        try:
            if self.watcher is not None:
                self.watcher(text)
                self.length = len(text)
            elif (place := place_of(sys.stderr)) == "log":
                self.list_kernels()
            else:
                self.rewrite(f"mpass: compiling: {text}" if text else "", place)
        except (OSError, ValueError):  # closed, or a pipe that nobody reads
            return

    def rewrite(self, line: str, place: Place) -> None:
        """Put the line over the last one."""
        stream = sys.stderr
        if place == "terminal":
            stream.write(f"\r{line}\x1b[K")
        else:
            stream.write(f"\r{line.ljust(self.length)}" + ("" if line else "\r"))
        stream.flush()
        self.length = len(line)

    def list_kernels(self) -> None:
        """A line for each kernel that takes long, once."""
        now = time.monotonic()
        for ticket, (name, begun) in self.kernels.items():
            if ticket not in self.told and now - begun >= self.after:
                self.told.add(ticket)
                sys.stderr.write(f"mpass: compiling a kernel ({name})\n")
        sys.stderr.flush()


def place_of(stream: TextIO) -> Place:
    """What a stream can do: take a line back with or without escape codes, or not at all."""
    if type(stream).__module__.partition(".")[0] == "ipykernel":
        return "notebook"
    return "terminal" if stream.isatty() else "log"


@functools.cache
def activity() -> Activity:
    """Of this process."""
    return Activity()
