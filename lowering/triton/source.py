"""From a TritonKernelSpec to a loaded module: render the template, write the file, import it.

The text is the cache key. Triton reads a kernel's source from its file, so that every module lies
in the folder `triton` of mpass's cache, whole or not at all: it is written aside and renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
import os
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import jinja2

from mpass.files import cache_dir
from mpass.lowering.index import ALL_BLOCKS, ALL_DIAGONALS, BLOCK
from mpass.lowering.kernel_sources import KernelSource, announce_source
from mpass.lowering.reference.selection import LAST_QUERIES
from mpass.lowering.triton.spec import SPLITS, TritonKernelSpec, int8_dim, parts, power_of_two

_one_at_a_time = threading.RLock()

TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """Templates of this folder; an unknown name in one of them is an error, not an empty string."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


@functools.cache
def render(spec: TritonKernelSpec) -> str:
    """The source of a module. Pure: the same spec gives the same text."""
    return (
        environment()
        .get_template(f"{spec.template}.py.jinja")
        .render(
            spec=spec,
            legend=legend(spec),
            block=BLOCK,
            all_blocks=ALL_BLOCKS,
            all_diagonals=ALL_DIAGONALS,
            parts=parts,
            power_of_two=power_of_two,
            int8_dim=int8_dim,
            log2=math.log2,
            ln2=math.log(2),
            log2_e=math.log2(math.e),
            last_queries=LAST_QUERIES,
            splits=SPLITS,
        )
    )


def legend(spec: TritonKernelSpec) -> str:
    """The spec in one line, for the head of the file: what differs from the defaults."""
    shown = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in dataclasses.fields(spec)
        if field.name in ("template", "dtype", "target")
        or getattr(spec, field.name) != field.default
    ]
    lines, line = [], "KernelSpec("
    for item in shown:
        if len(line) + len(item) > 94:
            lines.append(line.rstrip())
            line = "  "
        line += item + ", "
    return "\n".join([*lines, line.rstrip(", ") + ")"])


def write_module(source: str, name: str) -> Path:
    """The file that holds `source`; its name is the text's hash. Safe among processes."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = cache_dir() / "triton" / f"{name}_{digest}.py"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    os.replace(aside, path)
    return path


def load(spec: TritonKernelSpec, *, interpret: bool = False) -> ModuleType:
    """The module of a spec, ready to launch; `interpret` makes its kernels run in Python on CPU.

    One module whatever the threads that ask: what Triton has compiled is kept in it.
    """
    with _one_at_a_time:
        return loaded(spec, interpret)


@functools.cache
def loaded(spec: TritonKernelSpec, interpret: bool) -> ModuleType:
    """As `load`, which see: for one thread at a time."""
    import triton

    path = write_module(render(spec), spec.template)
    name = f"mpass_triton_{path.stem}{'_interpreted' if interpret else ''}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpret
        found.loader.exec_module(module)
    warps, stages = str(spec.num_warps), str(spec.num_stages)
    details = (
        ("made for", legend(spec)),
        ("warps", warps),
        ("stages", stages),
        ("file", str(path)),
    )
    announce_source(KernelSource(path.stem, "python", render(spec), details, spec))
    return module
