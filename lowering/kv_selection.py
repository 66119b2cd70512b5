"""Selecting what a cache keeps while a prompt runs: `minference::sparse_attention_kv`.

`options={"kv_select": SnapKV(...)}` puts this op in the place of sparse attention. It selects while
somebody listens (`select_keys`), and only computes attention otherwise: the numbers of SnapKV
stand in the graph, what is selected leaves through the object of the listener.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from mpass.errors import OptionValueError
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.ops import ARGUMENTS, ATTENTION, ATTENTION_SCHEMA, attend, over_index
from mpass.lowering.reference import kv_selection as reference
from mpass.lowering.reference.attention import empty_output
from mpass.lowering.reference.kv_selection import Pool


@dataclass(frozen=True, slots=True)
class SnapKV:
    """How the last queries of a prompt choose the keys that a cache keeps (arXiv 2404.14469).

    budget: keys that each kv head keeps, the last `window` ones included.
    window: so many queries at the end of the prompt look, and their own keys are kept.
    kernel: attention is joined over this many neighbouring keys, an odd number; 1 for none. The
        paper's 5 keeps where a number begins and loses its end (docs/compress.md).
    pool: how it is joined, "avg" or "max".
    by_length: whether a query's attention counts by the number of keys that it sees (FINCH).

    Raises OptionValueError for a number that cannot be.
    """

    budget: int = 1024
    window: int = 64
    kernel: int = 21
    pool: Pool = "avg"
    by_length: bool = False

    def __post_init__(self) -> None:
        numbers = (("window", 1), ("budget", max(1, self.window)), ("kernel", 1))
        for name, least in numbers:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionValueError(f"SnapKV.{name}", value, f"an int >= {least}")
        if self.kernel % 2 == 0:
            raise OptionValueError("SnapKV.kernel", self.kernel, "an odd number")
        if self.pool not in get_args(Pool):
            raise OptionValueError("SnapKV.pool", self.pool, ", ".join(get_args(Pool)))
        if not isinstance(self.by_length, bool):
            raise OptionValueError("SnapKV.by_length", self.by_length, "True or False")


@dataclass(slots=True)
class KVSelection:
    """What a prompt keeps, layer by layer, of the last forward pass that was listened to.

    positions: per layer int32 [B, Hk, budget], the positions of the kept keys, ascending; -1 stands
    behind them where a batch row has fewer real keys than the budget.
    length: per layer, keys that the cache had when it was selected.
    rule: how it was selected, where not as the model's option says.
    """

    positions: dict[int, Tensor] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)
    rule: SnapKV | None = None


LISTENERS: ContextVar[tuple[KVSelection, ...]] = ContextVar("mpass_kv_selections", default=())


@contextmanager
def select_keys(rule: SnapKV | None = None) -> Iterator[KVSelection]:
    """Listen to what models with `options={"kv_select": ...}` select in this block.

    rule: how to select, instead of the option's rule, as with a window of the question's tokens:
        it may be another one in each call of one compiled model. Blocks within one another select
        each for itself.

    Yields the object that holds it. Of a prompt in chunks the last one decides. Raises
    OptionValueError for a rule that is none.
    """
    if rule is not None and not isinstance(rule, SnapKV):
        raise OptionValueError("rule", rule, "an mpass.SnapKV")
    selection = KVSelection(rule=rule)
    token = LISTENERS.set((*LISTENERS.get(), selection))
    try:
        yield selection
    finally:
        LISTENERS.reset(token)


def keep_selection(
    selection: KVSelection, inputs: AttentionInputs, layer: int, rule: SnapKV
) -> None:
    """Select what one layer keeps. rule: that of the option, which the listener's own replaces."""
    query, key = inputs.query, inputs.key
    heads = range(query.shape[1])
    given = EstimateInputs(query, key, inputs.mask, heads, inputs.scale)
    selection.positions[layer] = reference.select_keys(given, **asdict(selection.rule or rule))
    selection.length[layer] = key.shape[2]


@define_op(
    "sparse_attention_kv",
    "(int budget, int observed, int kernel, str pool, bool by_length, "
    f"{ATTENTION_SCHEMA}, bool int8=False) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # who listens is asked in every call
)
def sparse_attention_kv(
    budget: int, observed: int, kernel: int, pool: Pool, by_length: bool, *arguments: Any
) -> Tensor:
    """`minference::sparse_attention`, which see, and the selection of what a cache keeps.

    budget, observed, kernel, pool, by_length: of SnapKV, `observed` its window. The result is of
    attention; the selection goes to whoever listens, see `select_keys`.
    """
    call = over_index(*arguments[:ARGUMENTS])
    if arguments[ARGUMENTS:] == (True,):
        call = replace(call, inputs=replace(call.inputs, int8=True))
    out = attend(call, ATTENTION).result
    for selection in LISTENERS.get():
        rule = SnapKV(budget, observed, kernel, pool, by_length)
        keep_selection(selection, call.inputs, call.layer, rule)
    return out


@fake_of("sparse_attention_kv")
def _(
    budget: int,
    observed: int,
    kernel: int,
    pool: str,
    by_length: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: object,
) -> Tensor:
    return empty_output(query, value)
