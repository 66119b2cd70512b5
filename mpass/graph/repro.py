"""A captured graph as a program that runs by itself, with its inputs saved or generated.

Numbers that a mask may be made of (token numbers, positions, padding) are saved as they were.
Floating-point inputs, weights above all, are generated with their shapes, strides and dtypes.
"""

from __future__ import annotations

import importlib
import textwrap
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpass.graph.nodes import number_now, value_of

MOST_SAVED = 16 << 20
"""Bytes of inputs that are saved; larger ones are generated."""

INPUTS_FILE = "inputs.pt"

PROGRAM = '''\
"""A graph that mpass was given, as a program: it runs the graph dense and sparse and compares.

{about}
"""

from pathlib import Path

import torch
{imports}

OPTIONS = {options}


{classes}


def generated(name, shape, stride, dtype, device):
    """A tensor of these sizes: small random numbers, or zeros where numbers are whole."""
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if 0 not in shape else 0
    if dtype.is_floating_point:
        random = torch.Generator().manual_seed(sum(map(ord, name)))
        values = torch.randn(size, generator=random) if len(shape) > 1 else torch.rand(size)
        scale = max(1, shape[-1]) ** -0.5 if len(shape) == 2 else 1.0
        memory = (values * scale).to(device=device, dtype=dtype)
    else:
        memory = torch.zeros(size, dtype=dtype, device=device)
    return memory.as_strided(shape, stride)


def inputs():
    """The arguments of the graph, the same ones at each call."""
    torch.manual_seed(0)
    file = Path(__file__).with_name("{inputs_file}")
    saved = torch.load(file) if file.is_file() else {{}}
    return [
{inputs}
    ]


def main():
    import mpass

    with torch.set_grad_enabled({gradients}):
        exact = Captured().eval()(*inputs())
        compiled = torch.compile(Captured().eval(), backend="minference", options=OPTIONS)
        found = compiled(*inputs())
    print(mpass.last_report())
    for i, (dense, sparse) in enumerate(zip(flat(exact), flat(found))):
        difference = (dense.double() - sparse.double()).abs().max().item() if dense.numel() else 0
        print(f"output {{i}} {{tuple(dense.shape)}}: largest difference {{difference:.3e}}")


def flat(outputs):
    """All tensors of floating-point numbers in what the graph returns."""
    found = torch.utils._pytree.tree_leaves(outputs)
    return [each for each in found if isinstance(each, torch.Tensor) and each.is_floating_point()]


if __name__ == "__main__":
    main()
'''


class NotWritable(Exception):
    """A graph that cannot be written as a program, and why."""


@dataclass(frozen=True, eq=False)
class Repro:
    """program: its source; saved: inputs by name that stand beside it in `INPUTS_FILE`."""

    program: str
    saved: dict[str, Tensor]


def make_repro(gm: fx.GraphModule, options: Mapping[str, object], about: str) -> Repro:
    """The program of a graph as Dynamo captured it.

    options: those of torch.compile, with values that can be written in Python.
    about: sentences for its docstring. Raises NotWritable.
    """
    imports: dict[str, str] = {}
    body = class_of(gm, "Captured", imports)
    saved: dict[str, Tensor] = {}
    lines = [input_line(node, saved) for node in gm.graph.nodes if node.op == "placeholder"]
    program = PROGRAM.format(
        about=about,
        imports="\n".join(sorted(set(imports.values()) - {"import torch"})),
        options=repr(dict(options)),
        classes=body,
        inputs_file=INPUTS_FILE,
        inputs=textwrap.indent("\n".join(lines), " " * 8),
        gradients=torch.is_grad_enabled(),
    )
    return Repro(program, saved)


def class_of(gm: fx.GraphModule, name: str, imports: dict[str, str]) -> str:
    """The source of a module class, sub-graphs as classes inside of it."""
    code = gm.graph.python_code("self")
    for word, value in code.globals.items():
        imports[word] = import_line(word, value)
    parts = [f"class {name}(torch.nn.Module):"]
    setup = []
    used = {str(node.target) for node in gm.graph.nodes if node.op in ("get_attr", "call_module")}
    for target in sorted(used):
        held = attribute(gm, target)
        if isinstance(held, fx.GraphModule):
            parts.append(textwrap.indent(class_of(held, f"{target}_class", imports), "    "))
            setup.append(f"self.{target} = self.{target}_class()")
        elif isinstance(held, Tensor) and "." not in target:
            setup.append(f"self.register_buffer({target!r}, {generated_call(target, held)})")
        else:
            raise NotWritable(f"it holds {target}, a {type(held).__name__}")
    if setup:
        lines = "\n".join(["super().__init__()", *setup])
        parts.append("    def __init__(self):\n" + textwrap.indent(lines, " " * 8))
    parts.append(textwrap.indent(code.src.strip("\n"), "    "))
    return "\n".join(parts)


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """What a module holds under a name with dots."""
    found: Any = gm
    for part in target.split("."):
        found = getattr(found, part)
    return found


def import_line(word: str, value: object) -> str:
    """The line that gives a name of the graph's code its meaning."""
    if word in ("inf", "nan"):
        return f"from math import {word}"
    if word == "NoneType":
        return "NoneType = type(None)"
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" if word == value.__name__ else imported_as(value, word)
    module = str(getattr(value, "__module__", None) or "torch")
    own = str(getattr(value, "__qualname__", None) or getattr(value, "__name__", ""))
    try:
        if own.isidentifier() and getattr(importlib.import_module(module), own) is value:
            return f"from {module} import {own} as {word}"
    except (ImportError, AttributeError):
        pass
    raise NotWritable(f"it calls {module}.{own or word}, which cannot be imported")


def imported_as(module: types.ModuleType, word: str) -> str:
    """`import a.b as word`."""
    return f"import {module.__name__} as {word}"


def input_line(node: fx.Node, saved: dict[str, Tensor]) -> str:
    """One argument of the graph, with its name; what is small and exact is put into `saved`."""
    value = value_of(node)
    if isinstance(value, Tensor):
        real = real_value(node)
        room = MOST_SAVED - sum(each.nbytes for each in saved.values())
        if real is not None and not value.is_floating_point() and real.nbytes <= room:
            saved[node.name] = real.detach().cpu().clone()
            return f"saved[{node.name!r}].to({str(value.device)!r}),  # {node.name}"
        return f"{generated_call(node.name, value)},"
    if isinstance(value, torch.SymInt):
        return f"{number_now(value)},  # {node.name}"
    if isinstance(value, bool | int | float | str | None):
        return f"{value!r},  # {node.name}"
    raise NotWritable(f"its input {node.name} is a {type(value).__name__}")


def real_value(node: fx.Node) -> Tensor | None:
    """The tensor that Dynamo traced with; None where it is gone."""
    try:
        found = node.meta["grapharg"].example
    except Exception:  # a weak reference may be dead, and internals may change
        return None
    fake = torch._subclasses.fake_tensor.FakeTensor
    return found if isinstance(found, Tensor) and not isinstance(found, fake) else None


def generated_call(name: str, value: Tensor) -> str:
    """`generated("x", (1, 4), (4, 1), torch.float32, "cpu")`."""
    sizes, strides = (tuple(map(number_now, each)) for each in (value.shape, value.stride()))
    return f"generated({name!r}, {sizes}, {strides}, {value.dtype}, {str(value.device)!r})"
