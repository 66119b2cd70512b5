"""Every op that has a rule, over the samples that PyTorch's own tests run it on.

What the reader says of a result is evaluated element by element and has to equal the result, or
else it names the result itself, which says nothing. The default run takes a part of the ops that
changes from day to day; `-m slow` takes all of them.
"""

from __future__ import annotations

import datetime
import itertools
import operator
import os
import random

import pytest
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.writes import StorageWrites
from mpass.masks.expressions import Where, is_truth
from mpass.masks.prover import RULES
from mpass.masks.reader import GraphReader

pytest.importorskip("expecttest", reason="PyTorch's own samples need it")
from torch.testing._internal.common_methods_invocations import op_db

DTYPES = (torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.int32)
CELLS = 6
"""Elements of a result that are looked at."""
SAMPLES = 12
"""Samples of an op and dtype in the default run."""

OPERATORS = {
    "__getitem__": operator.getitem,
    "bitwise_and": operator.and_,
    "bitwise_not": operator.invert,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
    "div": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
}
"""Python's operators that compute what an op does: graphs call them under other names."""
WITHOUT_SAMPLES = set(
    "alias as_tensor convert_element_type copy cpu cuda detach get_attr index lift_fresh"
    " lift_fresh_copy not placeholder reshape_copy setitem tensor to_copy type type_as unsafe_view"
    " zero".split()
)
"""Rules that PyTorch has no samples for: copies, conversions, assignments and inputs."""


def names_of(op):
    names = {op.name.split(".")[-1], *(alias.name for alias in op.aliases)}
    return names | ({OPERATORS[op.name].__name__.strip("_")} if op.name in OPERATORS else set())


OPS = {
    f"{op.name}.{op.variant_test_name}".strip("."): op for op in op_db if names_of(op) & set(RULES)
}


def part_of_today(share: int = 8) -> list[str]:
    """One op in `share`, others every day; MPASS_SEED chooses a day."""
    seed = int(os.environ.get("MPASS_SEED") or datetime.date.today().toordinal())
    names = sorted(OPS)
    random.Random(seed // share).shuffle(names)
    return names[seed % share :: share]


def graph_of(kind, op, sample):
    """A graph that runs a sample as Dynamo would write it, and the values of its nodes."""
    graph, values = fx.Graph(), {}

    def node(value):
        if not isinstance(value, torch.Tensor):
            return value
        new = graph.placeholder(f"x{len(values)}")
        values[new] = value.detach().clone()
        new.meta["example_value"] = values[new].clone()
        return new

    arguments = (sample.input, *sample.args), dict(sample.kwargs)
    args, kwargs = torch.utils._pytree.tree_map(node, arguments)
    if kind == "function":
        call = graph.call_function(op.op, args, kwargs)
    elif kind == "method":
        call = graph.call_method(op.get_method().__name__, args, kwargs)
    elif kind == "operator":
        call = graph.call_function(OPERATORS[op.name], args, kwargs)
    elif kind == "inplace":
        call = graph.call_method(op.get_inplace().__name__, args, kwargs)
    else:
        real = fx.map_arg((args, kwargs), lambda n: values[n].clone())
        kwargs["out"] = node(torch.empty_like(op.op(*real[0], **real[1])))
        call = graph.call_function(op.op, args, kwargs)
    return graph, call, values


def run_call(call, values, copies):
    args, kwargs = fx.map_arg((call.args, call.kwargs), lambda n: copies[n])
    if call.op == "call_method":
        return getattr(args[0], call.target)(*args[1:], **kwargs)
    return call.target(*args, **kwargs)


class Unknown(Exception):
    """The expression reads something whose values are not given: it says nothing wrong."""


def evaluate(expr, at, reader, values):
    """The value of an element expression at indices."""

    def go(e):
        if isinstance(e, Where):
            return go(e.args[1] if go(e.args[0]) else e.args[2])
        if isinstance(e, AppliedUndef):
            name = e.func.__name__
            node = reader.sources[name]
            if node not in values or "@" in name:
                raise Unknown
            tensor, rest = values[node], [int(go(arg)) for arg in e.args]
            place = tuple(0 if size == 1 else rest.pop(0) for size in tensor.shape)
            if any(not 0 <= i < size for i, size in zip(place, tensor.shape, strict=True)):
                raise AssertionError(f"{e} reads {place} of {list(tensor.shape)}")
            value = tensor[place].item()
            return int(value) if isinstance(value, bool) else value
        if isinstance(e, sympy.Symbol):
            return at[str(e)]
        if e in (sympy.true, sympy.false):
            return bool(e)
        if isinstance(e, sympy.And):
            return all(go(arg) for arg in e.args)
        if isinstance(e, sympy.Or):
            return any(go(arg) for arg in e.args)
        if isinstance(e, sympy.Not):
            return not go(e.args[0])
        if isinstance(e, sympy.core.relational.Relational):
            left, right = map(go, e.args)
            return (
                {"==": left == right, "!=": left != right}.get(e.rel_op)
                if e.rel_op in ("==", "!=")
                else {
                    "<": left < right,
                    "<=": left <= right,
                    ">": left > right,
                    ">=": left >= right,
                }[e.rel_op]
            )
        if e.is_number:
            return int(e) if e.is_Integer else float(e)
        return e.func(*(sympy.sympify(go(arg)) for arg in e.args))

    return go(expr)


def check(kind, op, sample) -> str:
    """What the reader says of one sample: "right" or "unknown"; a wrong answer raises."""
    graph, call, values = graph_of(kind, op, sample)
    copies = {node: value.clone() for node, value in values.items()}
    with torch.no_grad():
        result = run_call(call, values, copies)
        metas = {node: node.meta["example_value"] for node in values}
        call.meta["example_value"] = run_call(call, values, metas)
    if not isinstance(result, torch.Tensor) or result.is_sparse or result.is_quantized:
        return "unknown"
    output = graph.output(call)
    reader = GraphReader(StorageWrites(graph), RULES)
    expr = reader.read(call, output)
    cells = list(itertools.product(*map(range, result.shape)))
    for cell in random.Random(0).sample(cells, min(CELLS, len(cells))):
        at = {f"i{i}": index for i, index in enumerate(cell)}
        try:
            said = evaluate(expr, at, reader, values)
        except Unknown:
            return "unknown"
        real = result[cell].item()
        if is_truth(expr) or isinstance(said, bool) or result.dtype == torch.bool:
            equal = bool(said) == bool(real) and is_truth(expr) == (result.dtype == torch.bool)
        else:
            equal = float(said) == float(real) or (real != real)
        shapes = [list(value.shape) for value in values.values()]
        where = f"{kind} {op.name} of {shapes} {call.args} {call.kwargs} at {cell}"
        assert equal, f"{where}: read as {expr} = {said}, is {real}"
    return "right"


def run_op(name: str, most: int | None) -> tuple[list[str], dict[str, int]]:
    """Wrong answers for an op, and how many samples were right or unknown."""
    op, wrong, counts = OPS[name], [], {"right": 0, "unknown": 0, "refused": 0}
    for dtype in DTYPES:
        if dtype not in op.dtypes:
            continue
        samples = op.sample_inputs("cpu", dtype, requires_grad=False)
        for sample in itertools.islice(samples, most):
            kinds = ["function"] + ["operator"] * (op.name in OPERATORS)
            if isinstance(sample.input, torch.Tensor):
                kinds += ["method"] * (op.get_method() is not None)
                inplace = op.get_inplace() is not None and not sample.broadcasts_input
                kinds += ["inplace"] * inplace + ["out"] * op.supports_out
            for kind in kinds:
                try:
                    counts[check(kind, op, sample)] += 1
                except AssertionError as error:
                    wrong.append(str(error))
                except Exception:
                    # torch refuses some samples in some of the forms.
                    counts["refused"] += 1
    return wrong, counts


@pytest.mark.parametrize("name", part_of_today())
def test_what_is_read_of_pytorchs_samples_is_what_is_computed(name):
    wrong, _ = run_op(name, SAMPLES)
    assert wrong == [], f"{len(wrong)} wrong: {wrong[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPS))
def test_all_samples(name):
    wrong, _ = run_op(name, None)
    assert wrong == [], f"{len(wrong)} wrong: {wrong[0]}"


def test_rules_without_samples_are_known():
    assert set(RULES) - set().union(*map(names_of, op_db)) == WITHOUT_SAMPLES


def test_samples_are_read_and_not_only_given_up():
    _, counts = run_op("tril", SAMPLES)
    assert counts["right"] > 20
