"""What looks like attention and is of no spelling that is served: found, so that reports list it.

It is two products with only such ops between them as keep a cell for each query and key: scores
that a sigmoid or a squared ReLU makes into weights, heads that are mixed, kernels of linear
attention that are written with all cells. The walk goes backwards from the second product and
follows the axes of queries and of keys, whatever the ops are called.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mpass.graph.arguments import argument, subject
from mpass.graph.call_keys import hint
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.graph.site import AttentionSite, Length
from mpass.graph.writes import storage_of
from mpass.masks.expressions import Expr, number
from mpass.match.common import make_site
from mpass.match.eager_scores import CASTS, FACTORS, FOLDS, MASKS, MAX_STEPS, RESHAPES
from mpass.match.eager_weights import DROPOUTS
from mpass.match.products import einsum_arguments, is_product, operands

PASSING = (
    frozenset(
        "permute transpose swapaxes swapdims movedim mT T t unsqueeze squeeze clone detach".split()
    )
    | CASTS
    | RESHAPES
    | DROPOUTS
)
"""Ops between the products that make no other numbers of the cells."""

OTHER_TENSORS = frozenset("layer_norm rms_norm group_norm batch_norm embedding".split())
"""Ops whose results have no cells, whatever their shapes are."""

SPLITS = frozenset("split chunk split_with_sizes tensor_split unbind".split())
JOINS = frozenset("cat concat concatenate getitem slice narrow pad".split())
"""Ops that may change the number of keys."""

FEWEST_KEYS = 128
"""Fewer keys are no long prompt: blocks of chunked recurrences, windows of pictures."""

NO_SOFTMAX = (
    "attention without a softmax over its keys: its weights are made by {}, and only softmax "
    "attention is served"
)
OTHER_SOFTMAX = "the softmax is over another dimension than the keys that its weights are summed by"
UNREAD = "softmax attention that is not read: between its two products are {}"


@dataclass(frozen=True)
class Cells:
    """A tensor with a cell for each query and key: its axes, and the op that leads on from it."""

    node: fx.Node
    query: int
    key: int
    reader: Cells | None = None

    def path(self) -> list[fx.Node]:
        """The ops from this one on, without the second product."""
        following = [] if self.reader is None else self.reader.path()
        return [self.node, *following]


def find_unserved(
    graph: fx.Graph, known: set[fx.Node], outputs: Collection[fx.Node]
) -> list[AttentionSite]:
    """Dense sites of what looks like attention and is none of those that were found.

    known: softmaxes and ops at which an attention was found. outputs: where found ones end. What
    is written once and traced many times, as blocks of a loop are, is listed once.
    """
    sites: dict[tuple[object, ...], AttentionSite] = {}
    inputs = given_inputs(graph)
    for node in graph.nodes:
        if node in outputs or node in known:
            continue
        for cells, value in weights_of(node):
            found = first_product(cells)
            if found is None or value not in inputs or known & {*found.path()}:
                continue
            query, key = pair_of(found)
            if key not in inputs or not has_many_keys(cells, found):
                continue
            if is_given(key) and is_given(value) and not is_given(query):
                continue  # after a graph break the weights of a layer are inputs as any other
            rows = shape_of(cells.node)[cells.query]
            site = listed(node, (query, key, value), rows, why(found))
            sites.setdefault((site.path, site.source, site.dense_reason), site)
            break
    return list(sites.values())


def given_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on what a call is given: parameters are not, nor what they make."""
    inputs: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_tensor(node) and not isinstance(example(node), torch.nn.Parameter):
                inputs.add(node)
        elif not inputs.isdisjoint(node.all_input_nodes):
            inputs.add(node)
    return inputs


def is_given(node: fx.Node) -> bool:
    """Whether a tensor is one that the graph is given, or a view of it."""
    while node.op != "placeholder":
        before = subject(node) if op_name(node) in PASSING else None
        if not isinstance(before, fx.Node) or not is_tensor(before):
            return False
        node = before
    return True


def letters_of(product: fx.Node) -> tuple[str, str, str] | None:
    """The axes of a product's operands and result as letters; None where they are not distinct."""
    pair = operands(product)
    if op_name(product) != "einsum":
        ranks = [len(shape_of(tensor)) for tensor in pair]
        batch = string.ascii_uppercase[: len(shape_of(product)) - 2]
        left, right = (batch[len(batch) - (rank - 2) :] for rank in ranks)
        return f"{left}qc", f"{right}ck", f"{batch}qk"
    equation, _ = einsum_arguments(product)
    if not isinstance(equation, str) or "->" not in equation:
        return None
    given, result = equation.replace(" ", "").split("->")
    parts = [*given.split(","), result]
    if len(parts) != 3:
        return None
    spare = [letter for letter in string.ascii_uppercase if letter not in equation]
    written = []
    for part, tensor in zip(parts, (*pair, product), strict=True):
        hidden = len(shape_of(tensor)) - len(part.replace("...", ""))
        dots = "".join(spare[-hidden:]) if hidden > 0 else ""
        written.append(part.replace("...", dots))
        if len(set(written[-1])) != len(written[-1]) or len(written[-1]) != len(shape_of(tensor)):
            return None
    return written[0], written[1], written[2]


def weights_of(product: fx.Node) -> Iterator[tuple[Cells, fx.Node]]:
    """The operands of a product that may be weights, each with the value that is summed up."""
    if not is_product(product):
        return
    letters = letters_of(product)
    if letters is None or len(operands(product)) != 2:
        return
    *sides, result = letters
    pair = operands(product)
    places = (0, 1) if op_name(product) == "einsum" else (0,)
    for place in places:
        mine, other = sides[place], sides[1 - place]
        summed = (set(mine) & set(other)) - set(result)
        queries = (set(mine) - set(other)) & set(result)
        if len(summed) == len(queries) == 1:
            axes = mine.index(queries.pop()), mine.index(summed.pop())
            yield Cells(pair[place], *axes), pair[1 - place]


def first_product(cells: Cells) -> Cells | None:
    """The product of query and key behind weights, by the shortest way; None if there is none."""
    seen: set[tuple[fx.Node, int, int]] = set()
    level = [cells]
    for _ in range(MAX_STEPS):
        following: list[Cells] = []
        for item in level:
            if is_score_product(item):
                return item
            for step in behind(item):
                place = (step.node, step.query, step.key)
                if place not in seen:
                    seen.add(place)
                    following.append(step)
        level = following
    return None


def is_score_product(cells: Cells) -> bool:
    """Whether a product makes the cells: its operands have the queries and the keys apart."""
    if not is_product(cells.node):
        return False
    letters = letters_of(cells.node)
    if letters is None:
        return False
    query, key = letters[2][cells.query], letters[2][cells.key]
    owners = [tuple(letter in side for side in letters[:2]) for letter in (query, key)]
    summed = (set(letters[0]) & set(letters[1])) - set(letters[2])
    return len(summed) == 1 and sorted(owners) == [(False, True), (True, False)]


def pair_of(cells: Cells) -> tuple[fx.Node, fx.Node]:
    """Query and key of the product that makes the cells."""
    letters = letters_of(cells.node)
    pair = operands(cells.node)
    first = letters is not None and letters[2][cells.key] in letters[0]
    return (pair[1], pair[0]) if first else (pair[0], pair[1])


def behind(cells: Cells) -> Iterator[Cells]:
    """The tensors that an op makes cells of, each with the axes that it has them on."""
    node = cells.node
    if node.op not in ("call_function", "call_method") or op_name(node) in OTHER_TENSORS:
        return
    tensors = list(node.all_input_nodes)
    if op_name(node) == "getitem" and tensors and op_name(tensors[0]) in SPLITS:
        tensors = list(tensors[0].all_input_nodes)
    for tensor in tensors:
        if not is_tensor(tensor) or not example(tensor).dtype.is_floating_point:
            continue
        axes = axes_before(cells, tensor)
        if axes is not None:
            yield Cells(tensor, *axes, reader=cells)


def axes_before(cells: Cells, tensor: fx.Node) -> tuple[int, int] | None:
    """On which axes of an operand the queries and keys of a result are; None if not on both."""
    node, axes = cells.node, (cells.query, cells.key)
    name = op_name(node)
    rank, before = len(shape_of(node)), len(shape_of(tensor))
    if name == "linear":
        apart = subject(node) is tensor and rank - 1 not in axes
        return axes if apart else None
    if is_product(node):
        letters = letters_of(node)
        if letters is None:
            return None
        side = letters[operands(node).index(tensor)] if tensor in operands(node) else ""
        wanted = [letters[2][axis] for axis in axes]
        kept = all(letter in side for letter in wanted)
        return (side.index(wanted[0]), side.index(wanted[1])) if kept else None
    storage = storage_of(node)
    if name in FOLDS:
        found: list[int | None] = [same_place(node, tensor, axis) for axis in axes]
    elif storage is not None and storage == storage_of(tensor) and name not in JOINS:
        found = [same_step(node, tensor, axis) for axis in axes]
    else:
        found = [axis - (rank - before) for axis in axes]
    query, key = found
    if query is None or key is None or query == key or min(query, key) < 0:
        return None
    sizes = [number(shape_of(tensor)[place]) for place in (query, key)]
    wanted = [number(shape_of(node)[axis]) for axis in axes]
    # A sink, or keys of a memory, may be joined to the scores and cut off the weights.
    same = sizes[0] == wanted[0] and (sizes[1] == wanted[1] or name in JOINS)
    return (query, key) if same else None


def same_step(node: fx.Node, tensor: fx.Node, axis: int) -> int | None:
    """The axis of a tensor that a view of it has at `axis`: the one of its size and stride."""
    new, old = example(node), example(tensor)
    wanted = (number(new.shape[axis]), number(new.stride(axis)))
    steps = [(number(s), number(t)) for s, t in zip(old.shape, old.stride(), strict=True)]
    return steps.index(wanted) if wanted in steps else None


def same_place(node: fx.Node, tensor: fx.Node, axis: int) -> int | None:
    """The axis of a tensor that a reshaped one has at `axis`: of its size, before as many."""
    new, old = ([*map(number, shape_of(item))] for item in (node, tensor))

    def after(sizes: list[Expr], place: int) -> Expr:
        return sympy.expand(sympy.prod(sizes[place + 1 :]))

    wanted = (new[axis], after(new, axis))
    places = [place for place in range(len(old)) if (old[place], after(old, place)) == wanted]
    return places[0] if places else None


def has_many_keys(cells: Cells, found: Cells) -> bool:
    """Whether there are so many keys that cells cost something: more than a head has channels.

    Products of keys and values that linear attention keeps have a cell for two channels.
    """
    keys = shape_of(cells.node)[cells.key]
    letters = letters_of(found.node)
    if letters is None or (isinstance(keys, int) and keys < FEWEST_KEYS):
        return False
    (summed,) = (set(letters[0]) & set(letters[1])) - set(letters[2])
    channels = shape_of(operands(found.node)[0])[letters[0].index(summed)]
    return hint(keys) > hint(channels)


def why(found: Cells) -> str:
    """Why what stands between two products is not served, in words."""
    steps = found.path()[1:]
    names = [op_name(step) for step in steps]
    own = [name for name in names if name not in PASSING | FACTORS | MASKS]
    for item in chain_of(found):
        if op_name(item.node) != "softmax":
            continue
        dim = argument(item.node, "dim")
        rank = len(shape_of(item.node))
        if not isinstance(dim, int) or dim % rank != item.key:
            return OTHER_SOFTMAX
        return UNREAD.format(in_words(own))
    return NO_SOFTMAX.format(in_words(own) if own else "scaling and masking the scores")


def chain_of(found: Cells) -> Iterator[Cells]:
    """The cells from a product on."""
    item: Cells | None = found
    while item is not None:
        yield item
        item = item.reader


def in_words(names: list[str]) -> str:
    """Names of ops, each once, in their order."""
    return ", ".join(dict.fromkeys(names))


def listed(
    output: fx.Node, given: tuple[fx.Node, fx.Node, fx.Node], rows: Length, reason: str
) -> AttentionSite:
    """The dense site of an attention that no spelling knows, of query, key and value."""
    query, key, value = given
    return make_site(
        output,
        query=query,
        key=key,
        value=value,
        scale=1.0,
        mask=None,
        unproven=reason,
        dense_reason=reason,
        spelling="other",
        rows=rows,
    )
