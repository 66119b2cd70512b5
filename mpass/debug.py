"""The debug folder: what became of every compiled graph, in numbered folders of readable files.

`options={"debug": True}` or a folder, or the environment variable MPASS_DEBUG. Without either no
graph is printed and nothing is written; the same texts go to `TORCH_LOGS="+mpass"` and, through
`trace_structured`, to TORCH_TRACE and tlparse when those ask for them. Writing never stops a
compile: what cannot be written is a warning, and a folder appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import fx

from mpass.errors import in_one_line
from mpass.files import write_whole
from mpass.graph.printing import count_ops, op_difference, readable
from mpass.graph.repro import INPUTS_FILE, NotWritable, Repro, make_repro
from mpass.lowering.kernel_sources import KernelSource, watch_sources
from mpass.options import Options
from mpass.plan import AttentionPlan, Skip
from mpass.report import Report

log = logging.getLogger(__name__)

VARIABLE = "MPASS_DEBUG"
"""Environment variable: a folder, or 1 for `DEFAULT_FOLDER`; empty or 0 for off."""

DEFAULT_FOLDER = "mpass_debug"
"""Where `debug=True` writes, in the current folder."""

SCRATCH = ".writing-"
"""Folders being written begin so, with the number of the process next."""


GUIDE = """\
# What mpass did with each compiled graph

Each numbered folder is one graph, in the order of compilation:

| file | what it is |
|---|---|
| captured.py | the graph as Dynamo captured it, with shapes, strides and source lines |
| matched.txt, matched.json | every attention: shapes, patterns, proof of its mask; or why dense |
| rewritten.py | the graph that the inner compiler gets; comments name the arguments of our ops |
| repro.py | the captured graph as a program: runs it dense and sparse, and compares |
| inputs.pt | token numbers, positions and masks that repro.py needs; floats are generated |
| ops_diff.txt | the calls that changed |
| report.txt | the report of this graph; start here |
| config.json | the options that applied |
| timings.json | seconds of each pass and of the inner compiler |

kernels/ has the generated kernels, and beside each what it was made for and what its compiler says.

The arguments of an op of mpass in rewritten.py stand in the order of its schema:
`import mpass.backend, torch; print(torch.ops.minference.sparse_attention.default._schema)`

The files hold source lines and paths of your program, and the token numbers of its prompt: look at
them before you pass them on.
"""
"""What stands in `GUIDE_NAME` of a debug folder."""

GUIDE_NAME = "README.md"

KernelDetails = Callable[[KernelSource], Iterable[tuple[str, str]]]
"""Names and values that stand beside a kernel's source: what it is for, what its compiler says."""


class DebugFolderWarning(UserWarning):
    """A debug folder that could not be written; the compile went on without it."""


@dataclass(slots=True)
class Trace:
    """One graph on its way through the passes.

    root: the debug folder, None if there is none; kernel_details: what is written beside a kernel's
    source there; captured: the graph as text before the passes,
    empty if nobody reads it; ops: its calls by name; seconds: time of each pass, in order;
    last: when the latest step ended; decisions: one per site, after the last pass; folder: this
    graph's own folder, once written; repro: the captured graph as a program.
    """

    root: Path | None
    kernel_details: KernelDetails
    captured: str = ""
    ops: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)
    decisions: Sequence[AttentionPlan | Skip] = ()
    folder: Path | None = None
    repro: Repro | None = None

    def mark(self, step: str) -> None:
        """Take the time since the last mark as that of `step`."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        self.last = now


def debug_root(options: Options) -> Path | None:
    """The debug folder that the options ask for, else the environment, else None."""
    chosen = options.debug or os.environ.get(VARIABLE, "")
    if chosen in (False, "", "0"):
        return None
    folder = DEFAULT_FOLDER if isinstance(chosen, bool) or chosen == "1" else chosen
    return Path(folder).expanduser().absolute()


def open_trace(gm: fx.GraphModule, options: Options, kernel_details: KernelDetails) -> Trace:
    """Start tracing a graph before any pass has touched it.

    kernel_details: names and values to write beside the source of a kernel. It comes from the
    caller because it asks compilers, which nothing here knows.
    """
    emit_graph("captured", gm)
    root = debug_root(options)
    if root is None:
        return Trace(None, kernel_details)
    # A debugging aid: whatever goes wrong in it must not take the user's compile along.
    try:
        trace = Trace(root, kernel_details, readable(gm), count_ops(gm))
        trace.repro = reproduce(gm, options)
        return trace
    except Exception as error:
        warn_once(root, in_one_line(error))
        return Trace(None, kernel_details)


def reproduce(gm: fx.GraphModule, options: Options) -> Repro:
    """The program of a captured graph; where there is none, a file that says why."""
    about, given = repro_options(options)
    try:
        return make_repro(gm, given, about)
    except NotWritable as error:
        why = str(error)
    except Exception as error:  # a program less must not take the rest of the folder along
        why = in_one_line(error)
    return Repro(f"# This graph cannot be written as a program: {why}\n", {})


def repro_options(options: Options) -> tuple[str, dict[str, object]]:
    """What the program says of itself, and the options that it compiles with."""
    given: dict[str, object] = {
        "inner_backend": options.inner_backend,
        "dense_above": options.dense_above,
        "validate": options.validate,
        "read_masks": options.read_masks,
    }
    if options.min_seq_len is not None:
        given["min_seq_len"] = options.min_seq_len
    if options.grid is not None:
        given["grid"] = options.grid.values()
    config = options.sparse_config
    if config.default is not None:
        given["pattern"] = str(config.default)
    elif options.max_loss is not None:
        given["max_loss"] = options.max_loss
    about = "Floating-point inputs are generated: outputs are not those of the model."
    if config.layers:
        about += "\nThe config gave layers their own patterns; here all have the default."
    return about, given


def with_argument_names(gm: fx.GraphModule, decisions: Sequence[AttentionPlan | Skip]) -> str:
    """The rewritten graph, the arguments of our ops by name in a comment above each."""
    plans = iter([plan for plan in decisions if isinstance(plan, AttentionPlan)])
    comments: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "minference":
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = [f"{name}={value}" for name, value in zip(names, node.args, strict=False)]
        given += [f"{name}={value}" for name, value in node.kwargs.items()]
        about = node.target._opname
        if about in ("sparse_attention", "masked_attention"):
            plan = next(plans, None)
            if plan is not None:
                about += f" of layer {plan.site.layer} at {plan.site.path or 'an unknown place'}"
                about += f", patterns from {plan.config_source or 'the default'}"
        comments[node.name] = f"# {about}: {', '.join(given)}"
    lines = []
    for line in readable(gm).splitlines():
        name = line.strip().partition(":")[0].partition(" =")[0]
        if name in comments and "minference." in line:
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(indent + comments[name])
        lines.append(line)
    return "\n".join(lines) + "\n"


def repro_files(repro: Repro | None) -> dict[str, str | bytes]:
    """The program and its inputs, as files."""
    if repro is None:
        return {}
    return {"repro.py": repro.program, INPUTS_FILE: saved_bytes(repro)}


def saved_bytes(repro: Repro) -> bytes:
    """Inputs as torch.load reads them."""
    buffer = io.BytesIO()
    torch.save(repro.saved, buffer)
    return buffer.getvalue()


def close_trace(
    trace: Trace,
    gm: fx.GraphModule,
    decisions: Sequence[AttentionPlan | Skip],
    report: Report,
    options: Options,
) -> None:
    """Tell about a graph after the last pass: the log, the structured trace, the debug folder."""
    trace.decisions = decisions
    emit_graph("rewritten", gm)
    emit("report", "json", lambda: json.dumps(dataclasses.asdict(report), indent=1))
    if trace.root is None:
        return
    from mpass.inspection.decisions import (
        decision_as_dict,
        decision_as_text,
    )  # needs rich: only when asked

    try:
        trace.folder = write_numbered(
            trace.root,
            {
                "captured.py": trace.captured,
                "matched.txt": "\n\n".join(decision_as_text(d) for d in decisions) + "\n",
                "matched.json": as_json([decision_as_dict(d) for d in decisions]),
                "rewritten.py": with_argument_names(gm, decisions),
                **repro_files(trace.repro),
                "ops_diff.txt": op_difference(trace.ops, count_ops(gm)),
                "report.txt": f"{report}\n",
                "config.json": as_json(options_as_dict(options)),
                "timings.json": as_json(trace.seconds),
            },
        )
        write_whole(trace.root / GUIDE_NAME, GUIDE)
        watch_kernels(trace.root, trace.kernel_details)
    except Exception as error:
        warn_once(trace.root, in_one_line(error))
    trace.mark("debug")


def finish_trace(trace: Trace) -> None:
    """Write the timings again after the inner compiler, with its time."""
    if trace.folder is None or trace.root is None:
        return
    try:
        write_whole(trace.folder / "timings.json", as_json(trace.seconds))
    except OSError as error:
        warn_once(trace.root, in_one_line(error))


def emit_graph(stage: str, gm: fx.GraphModule) -> None:
    """A graph to the log and the structured trace, printed only if one of them listens."""

    def text() -> str:
        try:
            return readable(gm)
        except Exception as error:  # logs must not take the user's compile along
            return f"cannot be printed: {in_one_line(error)}"

    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s graph\n%s", stage, text())
    emit(f"{stage}_graph", "string", text)


def emit(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """An artifact `minference_<name>` for TORCH_TRACE; `payload` is called only if it is on."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"minference_{name}", "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def write_numbered(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files into the next free `root/NNN`, all of them or none."""
    root.mkdir(parents=True, exist_ok=True)
    remove_abandoned(root)
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=root))
    try:
        for name, content in files.items():
            if isinstance(content, str):
                (scratch / name).write_text(content, encoding="utf-8")
            else:
                (scratch / name).write_bytes(content)
        scratch.chmod(0o755)
        number = sum(path.name.isdecimal() for path in root.iterdir())
        while True:
            target = root / f"{number:03d}"
            try:
                return scratch.rename(target)
            except OSError:
                # Another process took the number; renaming over a filled folder is refused.
                if not target.is_dir():
                    raise
                number += 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_abandoned(root: Path) -> None:
    """Remove what runs that were killed while they wrote have left."""
    for path in root.glob(f"{SCRATCH}*"):
        owner = path.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdecimal() and not is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is another user's
    return True


@functools.cache
def watch_kernels(root: Path, kernel_details: KernelDetails) -> None:
    """Write every kernel of this process into `root/kernels`, now or when it is first built."""

    def write(kernel: KernelSource) -> None:
        try:
            folder = root / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / kernel.file_name, kernel.source)
            details = "".join(f"{name}: {value}\n" for name, value in kernel_details(kernel))
            write_whole(folder / f"{kernel.name}.txt", details)
        except OSError as error:
            warn_once(root, in_one_line(error))

    watch_sources(write)


def options_as_dict(options: Options) -> dict[str, object]:
    """The options that applied, patterns as text, and where debug was asked for."""
    values = {
        item.name: getattr(options, item.name)
        for item in dataclasses.fields(options)
        if item.name != "inductor"
    }
    values["inductor"] = dict(options.inductor)
    values["debug"] = "options" if options.debug else f"environment variable {VARIABLE}"
    return values


def as_json(value: object) -> str:
    """JSON text; objects without a JSON form become their text."""
    return json.dumps(value, indent=1, default=str) + "\n"


@functools.cache
def warned_roots() -> set[Path]:
    """Debug folders that were warned about in this process."""
    return set()


def warn_once(root: Path, fault: str) -> None:
    """One warning per debug folder and process."""
    if root in warned_roots():
        return
    warned_roots().add(root)
    warnings.warn(
        f"the debug folder {root} cannot be written ({fault}); compiling goes on without it: "
        f"set options={{'debug': FOLDER}} or {VARIABLE} to a folder that can be written",
        DebugFolderWarning,
        stacklevel=2,
    )
