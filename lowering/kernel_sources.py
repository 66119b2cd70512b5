"""Every kernel source that this process generated: for debug folders, pages and tests.

Kernels are chosen when an op first runs, so whoever wants their sources asks to be told. Off, it
costs nothing: a source is announced once, when it is built or loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelSource:
    """One generated kernel.

    name: unique, fit for a file name; language: "cpp" or "python"; details: what it was made for,
    as pairs of names and values; spec: what it was generated from, for those who ask the compiler
    about it (mpass.inspection.kernels).
    """

    name: str
    language: str
    source: str
    details: tuple[tuple[str, str], ...] = ()
    spec: object = None

    @property
    def file_name(self) -> str:
        return f"{self.name}.{'cpp' if self.language == 'cpp' else 'py'}"


_sources: dict[str, KernelSource] = {}
_watchers: list[Callable[[KernelSource], None]] = []


def announce_source(kernel: KernelSource) -> None:
    """Keep a generated source and tell everyone who watches."""
    if _sources.get(kernel.name) == kernel:
        return
    _sources[kernel.name] = kernel
    for watcher in _watchers:
        watcher(kernel)


def generated_sources() -> tuple[KernelSource, ...]:
    """All sources of this process, in the order in which they were first needed."""
    return tuple(_sources.values())


def watch_sources(watcher: Callable[[KernelSource], None]) -> None:
    """Call `watcher` with every source of this process: those there are, and those to come."""
    for kernel in generated_sources():
        watcher(kernel)
    _watchers.append(watcher)
