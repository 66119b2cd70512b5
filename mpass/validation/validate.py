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
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from mpass.errors import in_one_line
from mpass.failures import is_strict
from mpass.graph.nodes import MADE_HERE, example, is_tensor, op_name
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.graph.writes import StorageWrites
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference.attention import allowed_cells, masked_softmax, repeat_kv
from mpass.masks.conjuncts import HIDDEN
from mpass.match.sdpa import bind_sdpa
from mpass.plan import AttentionPlan, Skip
from mpass.validation.slices import (
    NotRunError,
    Part,
    Run,
    is_number,
    number_now,
    part_of,
    real_tensor,
    shape_now,
    size_now,
    value_of,
)

log = logging.getLogger(__name__)

REASON = "what its mask was proven to mean is not what the model computes: a fault of mpass"
"""Why an attention stays dense whose proof did not hold; the warning has the particulars."""

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


@dataclass(frozen=True)
class Difference:
    """Where a claim and the graph differ: what was compared, how many cells, the first of them."""

    what: str
    count: int
    first: tuple[str, ...]


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


class quiet:
    """No gradients, no tracing, and random numbers as they were before."""

    def __enter__(self) -> None:
        self.random = torch.random.get_rng_state()
        self.modes = _disable_current_modes()
        self.modes.__enter__()
        self.gradients = torch.no_grad()
        self.gradients.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.gradients.__exit__(*error)
        self.modes.__exit__(*error)
        torch.random.set_rng_state(self.random)


# -- the checks -------------------------------------------------------------------------------


def check_mask(validator: Validator, site: AttentionSite) -> Difference | None:
    """The mask that an SDPA call is given, cell by cell."""
    bound = bind_sdpa(site.output)
    if bound is None or bound.attn_mask is None or site.mask is None:
        return None
    mask: fx.Node = bound.attn_mask
    write = validator.writes.last_write(mask, validator.writes.position[site.output])
    key = ("mask", mask, write, claim_key(site), causal_flag(bound.is_causal))

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, [mask, *key_mask(site)], []):
            for run, rows in strips(validator, site, part, values):
                seen = run.strip(mask)
                if seen.dtype != torch.bool:
                    bias = (seen != 0) & ~(seen <= HIDDEN)
                    if bias.any():
                        return differing("additive mask", bias, rows, seen, None)
                    seen = seen == 0
                if bound.is_causal:
                    seen = seen & (torch.arange(seen.shape[-1]) <= rows[:, None]).to(seen.device)
                claimed = claimed_cells(site.mask, run, site, rows)
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
    block_mask: Any = flex.args[4]
    module = getattr(validator.gm, str(block_mask[-1].target), None)
    if not isinstance(module, fx.GraphModule):
        return None
    buffers = list(flex.args[8]) if len(flex.args) > 8 else []  # type: ignore[arg-type]
    tensors = [item for item in buffers if isinstance(item, fx.Node)]
    key = ("mask_mod", module, tuple(map(str, buffers)), claim_key(site))

    def check() -> Difference | None:
        batch, heads, _, _ = shape_now(site.query)
        num_keys = shape_now(site.key)[2]
        for part, values in inputs_of(validator, site, [*tensors, *key_mask(site)], []):
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
    softmax = softmax_of(site) if site.spelling == "eager" and site.mask is not None else None
    scores = softmax.args[0] if softmax is not None and softmax.args else None
    if softmax is None or not isinstance(scores, fx.Node):
        return None
    if site.sinks is not None and math.prod(shape_now(site.sinks)) != shape_now(site.query)[1]:
        return Difference("sinks", 1, (f"{list(shape_now(site.sinks))}, one per head is claimed",))
    given = attention_inputs(site)
    targets = [scores, *key_mask(site), *made_sinks(site)]

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, targets, given, softmax):
            for run, rows in strips(validator, site, part, values):
                got = run.strip(scores).double()
                expected = claimed_scores(site, run, rows)
                claimed = claimed_cells(site.mask, run, site, rows).expand(expected.shape)
                if site.sinks is not None:
                    column = run.whole(site.sinks).double().view(1, -1, 1, 1)
                    column = column.expand(*expected.shape[:-1], 1)
                    expected = torch.cat([expected, column], -1)
                    claimed = torch.cat([claimed, torch.ones_like(column, dtype=torch.bool)], -1)
                got = got.expand(expected.shape)
                if got.shape != expected.shape:
                    return None
                shift = (got - expected).masked_fill(~claimed, -torch.inf).amax(-1, keepdim=True)
                shift = shift.nan_to_num(0.0, 0.0, 0.0)
                near = (got - expected - shift).abs() <= tolerance(site) * (1 + expected.abs())
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
    if site.mask is None or site.spelling == "minference":
        return None
    if batch * heads * queries * shape_now(site.key)[2] > min(validator.effort.cells, 2**22):
        return None
    given = attention_inputs(site)
    targets = [site.output, *key_mask(site), *made_sinks(site)]

    def check() -> Difference | None:
        for part, values in inputs_of(validator, site, targets, given, after=True):
            run = Run(part, values, queries, validator.effort.largest)
            run.start()
            got = run.whole(site.output).double()
            got = got.transpose(1, 2) if site.output_transposed else got
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
            near = (got - expected).abs() <= tolerance(site) * (1 + expected.abs())
            wrong = ~near & claimed.any(-1, keepdim=True)
            if wrong.any():
                return differing("output", wrong, rows, got, expected)
        return None

    part = part_of(targets, given, next_node(site.output), validator.writes)
    return validator.once(("output", signature(part, site, site.output), claim_key(site)), check)


# -- what is claimed --------------------------------------------------------------------------


def claim_key(site: AttentionSite) -> tuple[Any, ...]:
    """What a site claims, comparable between layers of one graph."""
    mask = site.mask
    assert mask is not None
    inputs = (*map(shape_now, (site.query, site.key, site.value)), example(site.query).dtype)
    numbers = (site.scale, site.softcap, site.sinks is None, site.output_transposed)
    meaning = (mask.causal, str(mask.query_offset), mask.window, mask.key_mask)
    return (*inputs, *numbers, *meaning, str(mask.valid_keys))


def claimed_cells(mask: MaskMeaning | None, run: Run, site: AttentionSite, rows: Tensor) -> Tensor:
    """The cells [B or 1, 1, rows, Nk] that the claim lets be seen."""
    assert mask is not None
    if isinstance(mask.query_offset, fx.Node):
        raise NotRunError("the position of the first query is a tensor")
    device = example(site.query).device
    offset = size_now(mask.query_offset)
    num_keys = shape_now(site.key)[2]
    padding = None if mask.key_mask is None else run.whole(mask.key_mask)
    words = AttentionMask(mask.causal, offset, mask.window, padding)
    cells = allowed_cells(words, rows.to(device) + offset, num_keys)
    if mask.valid_keys is not None:
        cells = cells & (torch.arange(num_keys, device=device) < size_now(mask.valid_keys))
    return cells


def claimed_scores(site: AttentionSite, run: Run, rows: Tensor) -> Tensor:
    """Scores [B, H, rows, Nk] before any mask, in fp64."""
    query, key = run.whole(site.query), run.whole(site.key)
    query = query.index_select(2, rows.to(query.device)).double()
    key = repeat_kv(key, query.shape[1]).double()
    scores = query @ key.transpose(-1, -2) * site.scale
    return site.softcap * torch.tanh(scores / site.softcap) if site.softcap > 0 else scores


def tolerance(site: AttentionSite) -> float:
    """Largest relative difference that rounding makes in the site's dtype."""
    return {torch.float32: 1e-4, torch.float64: 1e-8}.get(example(site.query).dtype, 0.1)


def softmax_of(site: AttentionSite) -> fx.Node | None:
    """The softmax whose weights the output is made of."""
    nodes = [site.output]
    for _ in range(STEPS_TO_SOFTMAX):
        found = [node for node in nodes if op_name(node) == "softmax"]
        if found:
            return found[0]
        nodes = [node for each in nodes for node in each.all_input_nodes if is_tensor(node)]
    return None


def key_mask(site: AttentionSite) -> list[fx.Node]:
    return [site.mask.key_mask] if site.mask is not None and site.mask.key_mask else []


def attention_inputs(site: AttentionSite) -> list[fx.Node]:
    """Query, key, value and sinks of a site: where the part that is run begins."""
    sinks = [] if site.sinks is None else [site.sinks]
    if made_sinks(site):
        sinks = sinks[0].all_input_nodes
    return [site.query, site.key, site.value, *sinks]


def made_sinks(site: AttentionSite) -> list[fx.Node]:
    """The sinks of a site, if a matcher has made them of one that all heads share."""
    return [site.sinks] if site.sinks is not None and MADE_HERE in site.sinks.meta else []


# -- inputs -----------------------------------------------------------------------------------


def random_tensor(node: fx.Node, generator: torch.Generator) -> Tensor:
    """A tensor as a node stands for: normal, or zeros and ones."""
    fake, shape = example(node), shape_now(node)
    if fake.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(fake.dtype).to(fake.device)
    return random_padding(shape, generator).to(fake.dtype).to(fake.device)


def random_padding(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones with zeros at the left or at the right of each row, and with holes."""
    size = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    cut = torch.randint(0, max(1, size // 2), (rows, 1), generator=generator)
    at = torch.arange(size)
    left = torch.arange(rows)[:, None] % 2 == 0
    kept = torch.where(left, at >= cut, at < size - cut)
    kept &= torch.rand(rows, size, generator=generator) > 0.05
    return kept.reshape(shape)


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


def next_node(node: fx.Node) -> fx.Node:
    return node.next


def leaf_value(leaf: fx.Node, invented: bool, generator: torch.Generator) -> tuple[Any, bool]:
    """The value of an input, and whether it is a mask of zeros and ones that can be invented."""
    value = value_of(leaf)
    if is_number(value) and value is not None:
        return number_now(value), False
    real = real_tensor(leaf)
    if real is None and not isinstance(value, Tensor):
        owner: Any = leaf.graph.owning_module
        return getattr(owner, str(leaf.target)), False
    if real is None:
        return random_tensor(leaf, generator), example(leaf).dtype == torch.bool
    flags = not real.dtype.is_floating_point and real.numel() > 1
    flags = flags and bool(((real == 0) | (real == 1)).all())
    if invented and flags and leaf.op == "placeholder":
        return random_padding(tuple(real.shape), generator).to(real), True
    return real.clone(), flags and leaf.op == "placeholder"


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


def rows_to_check(queries: int, most: float) -> Tensor:
    """All query rows, or the first, the last and random ones between."""
    if queries <= most:
        return torch.arange(queries)
    count = max(4, int(most))
    ends = torch.arange(count // 4)
    generator = torch.Generator().manual_seed(queries)
    between = torch.randint(0, queries, (count - 2 * len(ends),), generator=generator)
    return torch.cat([ends, between, queries - 1 - ends]).unique()


# -- telling computations apart ---------------------------------------------------------------


def signature(part: Part, site: AttentionSite, target: fx.Node) -> tuple[Any, ...]:
    """A computation as a value: equal for layers that compute the same from their own inputs."""
    own = {site.query: "query", site.key: "key", site.value: "value"}
    if site.sinks is not None:
        own[site.sinks] = "sinks"
    names: dict[fx.Node, Any] = dict(own)
    shared = {node: ("leaf", node.name) for node in part.leaves}
    names.update({node: name for node, name in shared.items() if node not in names})
    steps = []
    for place, node in enumerate(part.nodes):
        names[node] = place
        named: Any = functools.partial(Named, names)
        args = str(fx.map_arg((node.args, node.kwargs), named))
        steps.append((node.op, str(node.target), args))
    return (*steps, names.get(target))


class Named:
    """A node in a signature."""

    def __init__(self, names: dict[fx.Node, Any], node: fx.Node) -> None:
        self.name = names.get(node, node.name)

    def __repr__(self) -> str:
        return f"<{self.name}>"


# -- what is said -----------------------------------------------------------------------------


def differing(
    what: str, wrong: Tensor, rows: Tensor, got: Tensor, claimed: Tensor | None
) -> Difference:
    """The difference that a tensor of wrong cells shows."""
    cells = wrong.nonzero()
    first = []
    for cell in cells[:5].tolist():
        place = tuple(cell)
        position = list(cell)
        if len(position) >= 2:
            position[-2] = int(rows[position[-2]])
        values = f"the graph has {got[place].item():g}"
        if claimed is not None:
            values += f", the proof says {claimed[place].item():g}"
        first.append(f"{position}: {values}")
    return Difference(what, len(cells), tuple(first))


def bug_report(site: AttentionSite, difference: Difference) -> str:
    """What to paste into a report: where, what was proven, what differs, versions."""
    import mpass

    mask = site.mask
    writes = StorageWrites(site.output.graph)
    try:
        part = part_of([site.output], attention_inputs(site), next_node(site.output), writes)
        ops = " ".join(op_name(node) for node in part.nodes)
    except (NotRunError, LookupError) as error:
        ops = in_one_line(error)
    lines = [
        f"{REASON}. It stays dense. Please report this text:",
        f"  site: {site.spelling} attention {site.path or site.output.name} at {site.source}",
        f"  ops: {ops}",
        *(f"  proof: {line}" for line in (mask.proof if mask is not None else ())),
        f"  differs: {difference.what}, {difference.count} cells looked at",
        *(f"    {line}" for line in difference.first),
        f"  versions: mpass {mpass.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
    ]
    return "\n".join(lines)
