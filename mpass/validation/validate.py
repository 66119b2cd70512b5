"""Holding every proof against what the graph computes, before anything is edited.

Three things are computed on concrete values, each only where it can be: the mask that an SDPA call
or a mask_mod gets, cell by cell; what an attention that is written out gives to its softmax, cell
by cell; and, for short prompts, the whole attention. What cannot be run is left as it was proven;
what differs is an error of mpass: it is raised in strict mode, else that attention stays dense and
a warning holds the report.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpass.errors import in_one_line
from mpass.failures import is_strict
from mpass.graph.arguments import argument
from mpass.graph.nodes import example, is_tensor, op_name
from mpass.graph.site import AttentionSite
from mpass.graph.writes import StorageWrites
from mpass.lowering.reference.attention import masked_softmax, repeat_kv
from mpass.masks.conjuncts import HIDDEN
from mpass.match.sdpa import bind_sdpa
from mpass.plan import AttentionPlan, Skip
from mpass.validation import report
from mpass.validation.claims import (
    attention_inputs,
    claim_key,
    claimed_cells,
    claimed_scores,
    has_bias,
    made_operands,
    mask_inputs,
    operands,
    tolerance,
    unfolded_rows,
)
from mpass.validation.report import REASON, Difference, Named, bug_report, differing
from mpass.validation.samples import leaf_value, next_node, quiet, random_tensor, rows_to_check
from mpass.validation.slices import (
    NotRunError,
    Part,
    Run,
    part_of,
    shape_now,
)

log = logging.getLogger(__name__)

STEPS_TO_SOFTMAX = 12
"""Ops looked at between an attention's output and its softmax."""


class ValidationError(AssertionError):
    """A proof that does not hold: raised in strict mode only, which is for tests."""


class ValidationWarning(UserWarning):
    """A proof that does not hold; the attention stays dense. The text is a report to paste."""


@dataclass(frozen=True)
class Effort:
    """How much is computed for one proof.

    cells: of one mask, counted over batch, heads, queries and keys; strip: computed at a time;
    largest: elements of a tensor that has to be computed whole.
    """

    cells: float
    strip: int
    largest: int


EFFORTS = {
    "sample": Effort(cells=2**18, strip=2**18, largest=2**22),
    "full": Effort(cells=math.inf, strip=2**22, largest=2**30),
}


def validate_sites(
    gm: fx.GraphModule, decisions: Sequence[AttentionPlan | Skip], effort: str
) -> list[AttentionPlan | Skip]:
    """The decisions, with a Skip for each plan whose proof does not hold.

    effort: "off", "sample" or "full". Never fails a compile and adds no guard; in strict mode a
    proof that does not hold raises ValidationError.
    """
    if effort == "off" or not any(isinstance(each, AttentionPlan) for each in decisions):
        return list(decisions)
    validator = Validator(gm, EFFORTS[effort])
    return [
        validator.checked(each) if isinstance(each, AttentionPlan) else each for each in decisions
    ]


class Validator:
    """Checks the sites of one graph; equal computations with equal claims are checked once."""

    def __init__(self, gm: fx.GraphModule, effort: Effort) -> None:
        self.gm = gm
        self.effort = effort
        self.writes = StorageWrites(gm.graph)
        self.known: dict[Any, Difference | None] = {}

    def checked(self, plan: AttentionPlan) -> AttentionPlan | Skip:
        """A plan, or the Skip in its place."""
        difference = self.difference(plan.site)
        if difference is None:
            return plan
        text = bug_report(plan.site, difference)
        if is_strict():
            raise ValidationError(text)
        warnings.warn(text, ValidationWarning, stacklevel=2)
        return Skip(plan.site, REASON, plan.config_source)

    def difference(self, site: AttentionSite) -> Difference | None:
        """The first difference that is found; None where there is none, or nothing can be run."""
        for check in (check_mask, check_mask_mod, check_scores, check_output):
            try:
                with quiet():
                    found = check(self, site)
            except NotRunError as reason:
                log.debug("%s of %s is not validated: %s", check.__name__, site.output, reason)
                continue
            except Exception as error:
                # What runs here is a part of the user's program, on values that are not the user's.
                fault = in_one_line(error)
                log.debug("%s of %s is not validated: %s", check.__name__, site.output, fault)
                continue
            if found is not None:
                return found
        return None

    def once(self, key: Any, check: Callable[[], Difference | None]) -> Difference | None:
        """The result of a check that many layers share."""
        if key not in self.known:
            self.known[key] = None
            self.known[key] = check()
        return self.known[key]


# -- the checks -------------------------------------------------------------------------------


def check_mask(validator: Validator, site: AttentionSite) -> Difference | None:
    """The mask that an SDPA call is given, cell by cell."""
    bound = bind_sdpa(site.output)
    if bound is None or bound.attn_mask is None or site.mask is None or site.key_bias:
        return None
    mask: fx.Node = bound.attn_mask
    write = validator.writes.last_write(mask, validator.writes.position[site.output])
    key = ("mask", mask, write, claim_key(site), causal_flag(bound.is_causal))

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, [mask, *mask_inputs(site)], []):
            for run, rows in strips(validator, site, part, values):
                seen = run.strip(mask)
                if site.distance_bias is not None:
                    if found := report.differing_bias(site, run, rows, seen):
                        return found
                    continue
                if seen.dtype != torch.bool:
                    bias = (seen != 0) & ~(seen <= HIDDEN)
                    if bias.any():
                        return differing("additive mask", bias, rows, seen, None)
                    seen = seen == 0
                if bound.is_causal:
                    seen = seen & (torch.arange(seen.shape[-1]) <= rows[:, None]).to(seen.device)
                claimed = claimed_cells(site.mask, run, site, rows)
                if site.output_folded:
                    seen = unfolded_rows(seen, site)
                seen, claimed = torch.broadcast_tensors(seen, claimed)
                if not torch.equal(seen, claimed):
                    return differing("attn_mask", seen != claimed, rows, seen, claimed)
        return None

    return validator.once(key, check)


def causal_flag(value: Any) -> bool:
    return bool(value) if isinstance(value, bool) else False


def check_mask_mod(validator: Validator, site: AttentionSite) -> Difference | None:
    """A mask_mod of flex_attention, cell by cell."""
    if site.spelling != "flex" or site.mask is None:
        return None
    (flex,) = site.output.all_input_nodes
    block_mask: Any = argument(flex, "block_mask")
    module = getattr(validator.gm, str(block_mask[-1].target), None)
    if not isinstance(module, fx.GraphModule):
        return None
    buffers = list(argument(flex, "mask_mod_other_buffers", ()))
    tensors = [item for item in buffers if isinstance(item, fx.Node)]
    key = ("mask_mod", module, tuple(map(str, buffers)), claim_key(site))

    def check() -> Difference | None:
        batch, heads, _, _ = shape_now(site.query)
        num_keys = shape_now(site.key)[2]
        for part, values in inputs_of(validator, site, [*tensors, *mask_inputs(site)], []):
            for run, rows in strips(validator, site, part, values):
                device = example(site.query).device
                indices = (
                    torch.arange(batch, device=device)[:, None, None, None],
                    torch.arange(heads, device=device)[:, None, None],
                    rows.to(device)[:, None],
                    torch.arange(num_keys, device=device),
                )
                seen = fx.Interpreter(module).run(*indices, *map(run.plain, buffers))
                seen = seen[0] if isinstance(seen, (tuple, list)) else seen
                claimed = claimed_cells(site.mask, run, site, rows)
                seen, claimed = torch.broadcast_tensors(seen, claimed)
                if not torch.equal(seen, claimed):
                    return differing("mask_mod", seen != claimed, rows, seen, claimed)
        return None

    return validator.once(key, check)


def check_scores(validator: Validator, site: AttentionSite) -> Difference | None:
    """What an attention that is written out gives to its softmax, against the claimed scores.

    A constant added to a whole row is no difference: softmax does not see it.
    """
    softmax = softmax_of(site) if site.spelling == "eager" and is_claimed(site) else None
    scores = softmax.args[0] if softmax is not None and softmax.args else None
    if softmax is None or not isinstance(scores, fx.Node):
        return None
    if site.sinks is not None and math.prod(shape_now(site.sinks)) != shape_now(site.query)[1]:
        return Difference("sinks", 1, (f"{list(shape_now(site.sinks))}, one per head is claimed",))
    given = attention_inputs(site)
    targets = [scores, *mask_inputs(site), *made_operands(site)]

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, targets, given, softmax):
            for run, rows in strips(validator, site, part, values):
                got = run.strip(scores).double()
                expected = claimed_scores(site, run, rows)
                claimed = claimed_cells(site.mask, run, site, rows).expand(expected.shape)
                if site.sinks is not None and got.shape[-1] > expected.shape[-1]:
                    column = run.whole(site.sinks).double().view(1, -1, 1, 1)
                    column = column.expand(*expected.shape[:-1], 1)
                    expected = torch.cat([expected, column], -1)
                    claimed = torch.cat([claimed, torch.ones_like(column, dtype=torch.bool)], -1)
                if got.dim() == 3:
                    got = got.reshape(*expected.shape[:3], -1)
                got = got.expand(expected.shape)
                if got.shape != expected.shape:
                    return None
                # Of the seen score that is least rounded: a large number beside others is not it.
                least = expected.abs().masked_fill(~claimed, torch.inf).argmin(-1, keepdim=True)
                shift = (got - expected).gather(-1, least).nan_to_num(0.0, 0.0, 0.0)
                slack = tolerance(site) * (1 + expected.abs())
                if has_bias(site):  # the row's largest numbers are rounded most
                    slack += 1e-6 * expected.abs().amax(-1, keepdim=True)
                near = (got - expected - shift).abs() <= slack
                near |= got == expected  # minus infinity, of a bias
                hidden = got - shift <= HIDDEN
                rows_seen = claimed.any(-1, keepdim=True)
                wrong = torch.where(claimed, ~near, ~hidden) & rows_seen
                if wrong.any():
                    return differing("scores", wrong, rows, got, claimed)
        return None

    part = part_of(targets, given, softmax, validator.writes)
    return validator.once(("scores", signature(part, site, scores), claim_key(site)), check)


def check_output(validator: Validator, site: AttentionSite) -> Difference | None:
    """The whole attention of a short prompt, from query, key and value to the output."""
    batch, heads, queries, _ = shape_now(site.query)
    if not is_claimed(site) or site.spelling == "minference":
        return None
    if batch * heads * queries * shape_now(site.key)[2] > min(validator.effort.cells, 2**22):
        return None
    given = attention_inputs(site)
    targets = [site.output, *mask_inputs(site), *made_operands(site)]

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, targets, given, after=True):
            run = Run(part, values, queries, validator.effort.largest)
            run.start()
            got = run.whole(site.output).double()
            got = got.transpose(1, 2) if site.output_transposed else got
            got = got.reshape(batch, heads, queries, -1) if site.output_folded else got
            rows = torch.arange(queries)
            run.at_rows(rows)
            claimed = claimed_cells(site.mask, run, site, rows)
            scores = claimed_scores(site, run, rows)
            sinks = None if site.sinks is None else run.whole(site.sinks)
            value = repeat_kv(run.whole(site.value), heads).double()
            expected = masked_softmax(scores, claimed, sinks) @ value
            if got.shape != expected.shape:
                shapes = (f"{list(got.shape)} computed", f"{list(expected.shape)} claimed")
                return Difference("shape of the output", 1, shapes)
            slack = tolerance(site) * (1 + expected.abs())
            if has_bias(site):  # large scores are rounded before the softmax
                slack += 1e-6 * scores.abs().amax() * value.abs().amax()
            near = (got - expected).abs() <= slack
            near |= (got == expected) | (got.isnan() & expected.isnan())
            wrong = ~near & claimed.any(-1, keepdim=True)
            if wrong.any():
                return differing("output", wrong, rows, got, expected)
        return None

    part = part_of(targets, given, next_node(site.output), validator.writes)
    return validator.once(("output", signature(part, site, site.output), claim_key(site)), check)


# -- what is claimed --------------------------------------------------------------------------


def is_claimed(site: AttentionSite) -> bool:
    """Whether something is claimed of a site: what its mask means, or which tensor it is."""
    return site.mask is not None or site.read_mask is not None


def softmax_of(site: AttentionSite) -> fx.Node | None:
    """The softmax whose weights the output is made of."""
    nodes = [site.output]
    for _ in range(STEPS_TO_SOFTMAX):
        found = [node for node in nodes if op_name(node) == "softmax"]
        if found:
            return found[0]
        nodes = [node for each in nodes for node in each.all_input_nodes if is_tensor(node)]
    return None


# -- inputs -----------------------------------------------------------------------------------


def inputs_of(
    validator: Validator,
    site: AttentionSite,
    targets: list[fx.Node],
    given: list[fx.Node],
    at: fx.Node | None = None,
    after: bool = False,
) -> Iterator[tuple[Part, dict[fx.Node, Any]]]:
    """What has to run for some nodes, with values of the inputs: the real ones, then random."""
    at = next_node(site.output) if after else at or site.output
    part = part_of(targets, given, at, validator.writes)
    generator = torch.Generator().manual_seed(11)
    for invented in (False, True):
        values: dict[fx.Node, Any] = {}
        flags = False
        for leaf in part.leaves:
            values[leaf], flag = leaf_value(leaf, invented, generator)
            flags = flags or flag
        values |= {node: random_tensor(node, generator) for node in given}
        yield part, values
        if not flags:
            return


def strips(
    validator: Validator, site: AttentionSite, part: Part, values: dict[fx.Node, Any]
) -> Iterator[tuple[Run, Tensor]]:
    """A run of a part, at some of the query rows after the other."""
    batch, heads, queries, _ = shape_now(site.query)
    per_row = batch * heads * shape_now(site.key)[2]
    run = Run(part, values, queries, validator.effort.largest)
    run.start()
    rows = rows_to_check(queries, validator.effort.cells / per_row)
    for chunk in rows.split(max(1, validator.effort.strip // per_row)):
        run.at_rows(chunk)
        yield run, chunk


# -- telling computations apart ---------------------------------------------------------------


def signature(part: Part, site: AttentionSite, target: fx.Node) -> tuple[Any, ...]:
    """A computation as a value: equal for layers that compute the same from their own inputs."""
    roles = ("query", "key", "value", "sinks")
    names: dict[fx.Node, Any] = dict(zip(attention_inputs(site), roles, strict=False))
    shared = {node: ("leaf", node.name) for node in part.leaves}
    names.update({node: name for node, name in shared.items() if node not in names})
    steps = []
    for place, node in enumerate(part.nodes):
        names[node] = place
        named: Any = functools.partial(Named, names)
        args = str(fx.map_arg((node.args, node.kwargs), named))
        steps.append((node.op, str(node.target), args))
    return (*steps, names.get(target), tuple(map(names.get, operands(site))))


# -- what is said -----------------------------------------------------------------------------
