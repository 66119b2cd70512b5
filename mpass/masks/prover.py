"""What an attention mask means, proven from the sub-graph that builds it.

The mask is read as a condition on (b, h, q, k) and split at its `and`s; a part that has none of the
known forms makes the whole mask unproven. Masks shared by many layers are proven once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mpass.graph.arguments import tensor_arguments
from mpass.graph.nodes import op_name, shape_of, value_of
from mpass.graph.site import Length, MaskMeaning
from mpass.graph.sizes import agree, current, given_numbers, holds
from mpass.graph.writes import StorageWrites
from mpass.masks.conjuncts import (
    MaskSizes,
    MaskTerms,
    at_most,
    classify_conjuncts,
    conjuncts,
    visible,
)
from mpass.masks.emitter import Emitter, as_length, find_key_mask
from mpass.masks.expressions import (
    HEAD,
    KEY,
    QUERY,
    Expr,
    NotUnderstood,
    number,
)
from mpass.masks.placing import Leading, mask_misfit, named, rename
from mpass.masks.reader import GraphReader
from mpass.masks.rules.arithmetic import ARITHMETIC_RULES
from mpass.masks.rules.indexing import INDEX_RULES
from mpass.masks.rules.values import VALUE_RULES
from mpass.masks.rules.views import SHAPE_RULES
from mpass.masks.scores import (
    PROBES,
    HiddenRows,
    hidden_numbers,
    hidden_rows,
    scaled,
    seen_scores,
)
from mpass.masks.unproven import describe, explain_added
from mpass.masks.windows import window_both_ways, window_size

RULES = {**VALUE_RULES, **ARITHMETIC_RULES, **INDEX_RULES, **SHAPE_RULES}


@dataclass(frozen=True)
class MaskProof:
    """What a mask was proven to mean, or why it was not; the condition that it was read as.

    hidden: the numbers that hide keys; replaced: whether they take the place of scores.
    """

    meaning: MaskMeaning | None
    reason: str = ""
    condition: Expr | None = None
    hidden: frozenset[Expr] = frozenset()
    replaced: bool = False


class MaskProver:
    """Proofs for the masks of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.writes = StorageWrites(graph)
        self.reader = GraphReader(self.writes, RULES)
        self._memo: dict[tuple[object, ...], MaskProof] = {}
        self.rearrangements: dict[object, bool] = {}
        self.lines: dict[object, fx.Node | None] = {}

    def prove_mask(
        self,
        mask: fx.Node,
        query: fx.Node,
        key: fx.Node,
        at: fx.Node,
        leading: Leading | None = None,
    ) -> MaskProof:
        """The meaning of a bool mask (True: seen) or an additive one, as the node `at` reads it.

        mask broadcasts to [B, H, Nq, Nk] of query [B, H, Nq, D] and key [B, Hk, Nk, D], or to
        [*leading, Nq, Nk], whose leading sizes are those of [B, H] in row-major order.
        """
        misfit = mask_misfit(mask, query, key, leading)
        if misfit:
            return MaskProof(None, misfit)
        sizes = mask_sizes(query, key)
        write = self.writes.last_write(mask, self.writes.position[at])
        memo = (mask, write, sizes, named(leading))
        if memo not in self._memo:
            condition = mask_condition(self.reader, mask, at)
            if not isinstance(condition, str):
                condition = rename(condition, len(shape_of(mask)), sizes, leading)
            proof = self.prove_condition(condition, sizes, key, at)
            self._memo[memo] = rows_without_keys(proof, hidden_rows(self.reader.read(mask, at)))
        return self._memo[memo]

    def prove_steps(
        self,
        steps: Sequence[tuple[fx.Node, fx.Node]],
        query: fx.Node,
        key: fx.Node,
        at: fx.Node,
        leading: Leading | None = None,
        factors: Mapping[fx.Node, float] | None = None,
    ) -> MaskProof:
        """The meaning of masks put on raw scores [B, H, Nq, Nk], op by op.

        leading: the leading sizes that scores have in the end instead of [B, H], in their order.
        factors: positive numbers by which some of the ops multiply the scores.
        steps: (op, its argument that carries the scores); the ops are add, sub, masked_fill, where
        and casts. Scores must remain themselves where a key is seen, see masks/scores.py.
        """
        sizes = mask_sizes(query, key)
        values: tuple[Expr, Expr] = PROBES
        of_one = sympy.Integer(1)
        for op, carried in steps:
            factor = (factors or {}).get(op)
            if factor is not None:
                values = scaled(values[0], factor), scaled(values[1], factor)
                of_one = scaled(of_one, factor)
                continue
            try:
                zero, one = (self.reader.read_step(op, carried, value) for value in values)
            except (NotUnderstood, LookupError, TypeError, ValueError) as reason:
                return MaskProof(None, self.unread_step(op, carried, str(reason)))
            values = zero, one
        if visible(values[0]) is None:
            unread = explain_added(values[0], self.reader)
            return MaskProof(None, unread)
        condition = seen_scores(values, of_one)
        if condition is None:
            return MaskProof(None, "scores are replaced or scaled where a key is seen")
        rank = 4 if leading is None else len(leading) + 2
        condition = rename(condition, rank, sizes, leading)
        if isinstance(condition, str):
            return MaskProof(None, condition)
        memo = (condition, sizes)
        if memo not in self._memo:
            self._memo[memo] = self.prove_condition(condition, sizes, key, at)
        proof = rows_without_keys(self._memo[memo], hidden_rows(*values))
        hidden, of_one = map(hidden_numbers, values)
        return dataclasses.replace(proof, hidden=frozenset(hidden), replaced=hidden == of_one)

    def unread_step(self, op: fx.Node, carried: fx.Node, reason: str) -> str:
        """Why what an op does to scores is not understood: what is added may itself say it."""
        others = [node for node in tensor_arguments(op) if node is not carried]
        if op_name(op) == "add" and len(others) == 1:
            expr = self.reader.read(others[0], op)
            if visible(expr) is None and expr.atoms(AppliedUndef):
                return explain_added(expr, self.reader)
        return f"{op_name(op)} on the scores: {reason}"

    def prove_mask_mod(
        self,
        graph: fx.Graph,
        arguments: Mapping[fx.Node, Expr],
        sizes: MaskSizes,
        key: fx.Node,
        at: fx.Node,
    ) -> MaskProof:
        """The meaning of a mask_mod(b, h, q, k); `arguments`: what its placeholders stand for."""
        reader = self.reader.inner(StorageWrites(graph), arguments)
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        result = output.args[0]
        result = result[0] if isinstance(result, (list, tuple)) else result
        if not isinstance(result, fx.Node):
            return MaskProof(None, "mask_mod returns a constant")
        condition = visible(reader.read(result, output))
        if condition is None:
            return MaskProof(None, "mask_mod does not return a condition")
        return self.prove_condition(condition, sizes, key, at)

    def prove_condition(
        self,
        condition: Expr | str,
        sizes: MaskSizes,
        key: fx.Node,
        at: fx.Node,
    ) -> MaskProof:
        """The meaning of a condition on (b, h, q, k); a string is why there is none."""
        if isinstance(condition, str):
            return MaskProof(None, condition)
        # What was read before a guard made two sizes one is read with both names.
        like = lengths(self.reader)
        condition = current(condition, like)
        proof = self.assembled(condition, sizes, key, at)
        if proof.meaning is not None:
            return proof
        # Windows and the like that the program is given as integers are fixed by a guard.
        numbers = given_numbers(condition, like)
        fixed = condition.xreplace({old: sympy.Integer(new) for old, new in numbers.items()})
        again = self.assembled(fixed, sizes, key, at) if numbers else proof
        if again.meaning is None:
            return proof
        agreed = all(equals_now(symbol, value, like) for symbol, value in numbers.items())
        return again if agreed else proof

    def assembled(self, condition: Expr, sizes: MaskSizes, key: fx.Node, at: fx.Node) -> MaskProof:
        """The meaning of a condition whose symbols are as they are."""
        try:
            meaning = assemble(classify_conjuncts(condition, sizes), sizes, self.reader, key, at)
            return MaskProof(meaning, "", condition)
        except NotUnderstood as reason:
            return MaskProof(None, str(reason), condition)


def equals_now(symbol: Expr, value: int, like: Sequence[Length]) -> bool:
    """Whether a symbol is a number in every call that the graph serves, by a guard."""
    length = as_length(symbol, like)
    return length is not None and agree(length, value)


def rows_without_keys(proof: MaskProof, rows: HiddenRows) -> MaskProof:
    """A proof, given up where rows that see no key are more than padding.

    rows: what eager attention makes of them; sparse attention gives zeros. Causal attention, and a
    window, show a query its own position unless the key mask hides that: the query is padding then
    itself; where no tensor of the graph says what is padding, this is no padding. Attention that
    is not causal hides all keys from real queries where a batch row has no key: such batch rows
    are looked for in each call, and get the mean of all values if that is what eager gives.
    """
    meaning, condition = proof.meaning, proof.condition
    if not rows.finite or meaning is None or meaning.key_mask is None or condition is None:
        return proof
    if meaning.window == 0 and sees_first_key(condition):
        return proof
    aligned = meaning.causal or meaning.window > 0  # a query sees its own position
    if not aligned and rows.mean:
        words = "rows that see no key are the mean of all values, looked for in each call"
        told = dataclasses.replace(meaning, mean_of_hidden=True, proof=(*meaning.proof, words))
        return dataclasses.replace(proof, meaning=told)
    if not aligned or not condition.atoms(AppliedUndef):
        reason = "rows that see no key are a mean of values: hide keys by -inf, not a number"
        return MaskProof(None, reason, condition)
    words = "rows that see no key are padding: zeros, not the mean of all values"
    told = dataclasses.replace(meaning, proof=(*meaning.proof, words))
    return dataclasses.replace(proof, meaning=told)


def sees_first_key(condition: Expr) -> bool:
    """Whether what a mask says of keys alone never hides the first one."""
    terms = [term for term in conjuncts(condition) if not term.has(QUERY)]
    return bool(
        sympy.And(*(term.xreplace({KEY: sympy.Integer(0)}) for term in terms)) == sympy.true
    )


def mask_sizes(query: fx.Node, key: fx.Node) -> MaskSizes:
    """Sizes of the mask of query [B, H, Nq, D] and key [B, Hk, Nk, D]."""
    batch, heads, queries, _ = shape_of(query)
    return MaskSizes(number(batch), number(heads), number(queries), number(shape_of(key)[2]))


def mask_condition(reader: GraphReader, mask: fx.Node, at: fx.Node) -> Expr | str:
    """When a mask lets a key be seen, in the mask's own axes; or why that cannot be said."""
    expr = reader.read(mask, at)
    condition = visible(expr)
    if condition is None:
        return explain_added(expr, reader)
    return condition


def assemble(
    terms: MaskTerms, sizes: MaskSizes, reader: GraphReader, key: fx.Node, at: fx.Node
) -> MaskMeaning:
    """The meaning of classified terms. Raises NotUnderstood with the reason why there is none."""
    if sympy.false in terms.padding:
        raise NotUnderstood("the mask hides every key")
    if terms.unknown:
        raise NotUnderstood(describe(terms.unknown[0], reader))
    like = (*shape_of(key), *lengths(reader))
    proof: list[str] = []
    offset: Length | fx.Node = 0
    window = 0
    both_ways = window_both_ways(terms, sizes, like)
    if both_ways is not None:
        window = both_ways
        if window:
            proof.append(f"window of {window} both ways: |q - k| < {window}")
    elif terms.offset is not None:
        offset = query_offset(terms.offset, like, reader)
        proof.append(f"causal: k <= q + {terms.offset}" if terms.offset != 0 else "causal: k <= q")
    if terms.width is not None and both_ways is None:
        window = window_size(terms, sizes)
        if window:
            proof.append(f"window of {window}: q - k < {terms.width}")
    valid_keys = None
    if terms.valid is not None and not at_most(sizes.keys, terms.valid):
        valid_keys = valid_length(terms, sizes, like)
        proof.append(f"valid keys: k < {terms.valid}")
    key_mask = None
    if terms.padding:
        key_mask = key_mask_node(terms, sizes, reader, key, at)
        proof.append(f"padding: {sympy.And(*terms.padding)}")
    proof += [f"always true: {term}" for term in terms.dropped]
    return MaskMeaning(
        causal=terms.offset is not None and both_ways is None,
        query_offset=offset,
        window=window,
        key_mask=key_mask,
        valid_keys=valid_keys,
        proof=tuple(proof) or ("every key is seen",),
    )


def lengths(reader: GraphReader) -> list[torch.SymInt]:
    """A SymInt of the graph, if there is one: the way into its shape environment."""
    for node in reader.writes.position:
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return [value]
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    return [size]
    return []


def valid_length(terms: MaskTerms, sizes: MaskSizes, like: Sequence[Length]) -> Length | None:
    """The number of keys that a mask leaves, if keys and values can be cut to it.

    They cannot where a query may stand after the last valid key, or where the number may be more
    than there are: then the length becomes a term of the key mask, and None is returned.
    """
    valid = terms.valid
    length = as_length(valid, like)
    if length is None:
        raise NotUnderstood(f"number of valid keys {valid} is not a size")
    if not holds(length >= 1, length):
        raise NotUnderstood(f"number of valid keys {valid} might not be positive")
    keys = as_length(sizes.keys, like)
    if terms.offset is None and keys is not None and statically_known_true(length <= keys):
        return length
    terms.padding.append(KEY < valid)
    return None


def query_offset(expr: Expr, like: Sequence[Length], reader: GraphReader) -> Length | fx.Node:
    """Position of the first query, as a number or as the tensor that holds it."""
    if expr.atoms(AppliedUndef):
        node = reader.sources.get(getattr(expr.func, "__name__", ""))
        if isinstance(expr, AppliedUndef) and node and not reader.writes.ever_written(node):
            return node
        raise NotUnderstood(f"the first query's position is known at run time only: {expr}")
    offset = as_length(expr, like)
    if offset is None:
        raise NotUnderstood(f"query offset {expr} is not a size")
    if isinstance(offset, int) and offset < 0:
        raise NotUnderstood(f"queries do not see their own position: k <= q - {-offset}")
    if not holds(offset >= 0, offset):
        raise NotUnderstood(f"query offset {expr} might be negative")
    return offset


def key_mask_node(
    terms: MaskTerms, sizes: MaskSizes, reader: GraphReader, key: fx.Node, at: fx.Node
) -> fx.Node:
    """Bool [B, Nk] for terms in b and k: a tensor of the graph, or a new one made of its inputs."""
    condition = sympy.And(*terms.padding)
    implied = [term for term in terms.dropped if not term.has(HEAD, QUERY)]
    for candidate in (condition, sympy.And(condition, *implied)):
        node = find_key_mask(reader, candidate, sizes)
        if node is not None:
            return node
    return Emitter(reader, key, at).key_mask(condition)
