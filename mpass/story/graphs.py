"""What is known of each compiled graph beside its report: whose it is, and why it ended.

Dynamo compiles while the program runs, so that the Python stack tells which model called. This
holds for resumed functions after a graph break and for layers that are compiled one by one.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from mpass.report import KEPT_REPORTS, Report, keep_report, reports


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """One graph.

    report: its report; owner: the model, or the function, that was called; None if it is not known
    or gone. options: those of the compile. number: how many graphs were kept before it. reset: how
    often Dynamo forgot its graphs before. frame, compiler: which code is compiled by which
    torch.compile. broken: why and where the graph ended early; "" if it did not.
    """

    report: Report
    owner: weakref.ref[Any] | None
    options: object
    number: int
    reset: int
    frame: tuple[str, str, int] | None
    compiler: weakref.ref[Any] | None
    broken: str = ""


@dataclass
class History:
    """All that is kept, and what Dynamo compiled since it was reset.

    seen: the number of the last compile of each function, by the function's number.
    """

    graphs: deque[CompiledGraph]
    seen: dict[int, int]
    count: int = 0
    resets: int = 0


_history = History(deque(maxlen=KEPT_REPORTS), {})


def keep_graph(report: Report, options: object = None) -> None:
    """Keep the report of a graph, and whose it is. Called while Dynamo compiles the graph."""
    keep_report(report)
    output = dynamo_output()
    frame: tuple[str, str, int] | None = None
    compiler, owner = None, None
    if output is not None:
        note_reset(torch._guards.CompileContext.current_compile_id())
        root = output.root_tx
        frame = (root.f_code.co_filename, root.f_code.co_name, id(root.f_locals.get("self")))
        compiler = as_reference(getattr(output, "compiler_fn", None))
        owner = find_owner()
    _history.graphs.append(
        CompiledGraph(
            report,
            as_reference(owner),
            options,
            _history.count,
            _history.resets,
            frame,
            compiler,
            graph_break(output),
        )
    )
    _history.count += 1


def note_reset(compile_id: Any) -> None:
    """Count a reset of Dynamo where one must have been before this compile.

    Dynamo numbers functions as it first meets them, and the compiles of each: a number that is not
    above those of its kind that were seen comes only after a reset. Other backends' are not seen.
    """
    frame = getattr(compile_id, "frame_id", None)
    if frame is None:
        return
    number, seen = compile_id.frame_compile_id, _history.seen
    again = number <= seen.get(frame, -1)
    late = number == 0 and frame < max(seen, default=-1)
    if again or late:
        seen.clear()
        _history.resets += 1
    seen[frame] = number


def kept_graphs() -> list[CompiledGraph]:
    """The graphs whose reports are kept, oldest first."""
    known = {id(report) for report in reports()}
    return [graph for graph in _history.graphs if id(graph.report) in known]


def graphs_kept() -> int:
    """How many graphs this process has compiled."""
    return _history.count


def graphs_of_last_model() -> list[CompiledGraph]:
    """The graphs of the model that was compiled last, oldest first.

    Others of the model do not count if it was compiled anew after them: by other options, after
    torch._dynamo.reset(), or by another torch.compile of the same code.
    """
    graphs = kept_graphs()
    if not graphs:
        return []
    last = graphs[-1]
    owner = None if last.owner is None else last.owner()
    if owner is None:
        return [last]
    found: list[CompiledGraph] = []
    compilers: dict[object, object] = {}
    for graph in reversed(graphs):
        if graph.reset != last.reset:
            break
        if graph.owner is None or graph.owner() is not owner or graph.options != last.options:
            continue
        # An object has one plain weak reference; a number of its address may be used again.
        if compilers.setdefault(graph.frame, graph.compiler) is not graph.compiler:
            break
        found.append(graph)
    return found[::-1]


def dynamo_output() -> Any:
    """Dynamo's state of the graph that is being compiled; None outside of Dynamo."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output
    except (ImportError, AttributeError):
        return None


def graph_break(output: Any) -> str:
    """Why and where a graph ended before its function did; "" if it did not."""
    reason = getattr(output, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    text = str(reason.reason).splitlines()[0].strip()
    stack = list(reason.user_stack or [])
    return f"{text} at {stack[-1].filename}:{stack[-1].lineno}" if stack else text


def find_owner() -> nn.Module | Any | None:
    """The outermost module whose method is running, else the compiled function; None if unknown."""
    function: Any = None
    owner: nn.Module | None = None
    for code, variables in running():
        module = variables.get("self")
        if isinstance(module, nn.Module):
            owner = getattr(module, "_orig_mod", module)
        elif code.co_name == "compile_wrapper":
            function = variables.get("fn", function)
            bound = getattr(function, "__self__", None)
            owner = bound if isinstance(bound, nn.Module) else owner
    return function if owner is None else owner


def running() -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """Code and local variables of the frames of this thread, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code, frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


def as_reference(owner: object) -> weakref.ref[Any] | None:
    try:
        return None if owner is None else weakref.ref(owner)
    except TypeError:
        return None
