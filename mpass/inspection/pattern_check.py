"""Hold a pattern of one's own against its own truth: `mpass pattern check FILE.py:Name`.

Each instance of `examples()` and the default one are run on small random inputs, as a whole prompt,
as its second half after a cached prefix, and with padding.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpass.config.operands import attention_mask
from mpass.errors import MpassError, PatternFileError, in_one_line
from mpass.functional import computed_mask, sparse_attention
from mpass.inspection.draw import Picture, draw_pattern
from mpass.lowering.index import BLOCK, AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Pattern,
    find_pattern,
    register_pattern,
    registered_patterns,
)
from mpass.patterns.base.scored import EstimatedPattern

TOKENS = 400
"""Keys of a prompt: some blocks, the last of them not full."""

ROWS = 16
"""Rows of a picture, one per block of its prompt."""

TOLERANCE = 1e-4
"""Largest difference between fp32 kernels and fp64 attention over the same cells."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. fault: what is wrong, "" if nothing is."""

    pattern: str
    what: str
    fault: str


def load_pattern(place: str) -> type[Pattern]:
    """The class of `FILE.py:Name`, or the pattern that has this name. Runs the file.

    Raises PatternFileError for a file or class that cannot be used, and what registering raises.
    """
    file, colon, name = place.rpartition(":")
    if not colon:
        return find_pattern(place)
    path = Path(file)
    if not path.is_file():
        raise PatternFileError(place, "no such file")
    registered_patterns()  # its name must not be one of these
    module_name = f"mpass_checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise PatternFileError(place, "this is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except MpassError:
        raise
    except Exception as error:
        raise PatternFileError(place, f"the file raises {in_one_line(error)}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise PatternFileError(place, f"the file has no class {name!r}")
    return register_pattern(found)


def check_pattern(cls: type[Pattern]) -> Iterator[Check]:
    """All checks of a class, as they are done; what raises is a fault of that check."""
    for pattern in dict.fromkeys((cls(), *cls.examples())):
        for what, look in CHECKS.items():
            try:
                fault = look(pattern)
            except Exception as error:
                fault = f"raises {in_one_line(error)}"
            yield Check(pattern.in_words(), what, fault)


def picture_of(cls: type[Pattern]) -> Picture | None:
    """What the default pattern selects, small enough for a terminal; None where it raises."""
    try:
        return draw_pattern(cls(), num_tokens=ROWS * BLOCK, resolution=ROWS)
    except Exception:  # the checks have told it
        return None


def check_cost(pattern: Pattern) -> str:
    """The formula has to be a number once length and head_dim are."""
    cost = pattern.cost().subs({LENGTH: 8192, HEAD_DIM: 64})
    return "" if cost.is_number and cost > 0 else f"cost() is {cost} for 8192 tokens of 64 numbers"


def check_whole(pattern: Pattern) -> str:
    """A prompt without anything before it."""
    return compare(pattern, *inputs(TOKENS, TOKENS), None)


def check_chunk(pattern: Pattern) -> str:
    """Queries after a cached prefix, which end within a block."""
    return compare(pattern, *inputs(150, TOKENS), None)


def check_padding(pattern: Pattern) -> str:
    """Two rows of a batch, the second with padding at the left."""
    key_mask = torch.ones(2, TOKENS, dtype=torch.bool)
    key_mask[1, :77] = False
    return compare(pattern, *inputs(TOKENS, TOKENS, batch=2), key_mask)


CHECKS: dict[str, Callable[[Pattern], str]] = {
    "cost": check_cost,
    "whole prompt": check_whole,
    "after a cached prefix": check_chunk,
    "batch with padding": check_padding,
}
"""What is looked at, by name."""


def inputs(queries: int, keys: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, 4, Nq, 16], key and value [B, 2, Nk, 16]."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, queries), (2, keys), (2, keys))
    query, key, value = (torch.randn(batch, *s, 16, generator=generator) for s in sizes)
    return query, key, value


def compare(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> str:
    """The first of these that fails: selected is visible, computed holds it, output is right."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset = num_keys - num_queries
    mask = attention_mask(query, key, value, True, True, offset, 0, key_mask)
    positions = torch.arange(num_queries) + offset
    visible = reference.allowed_cells(mask, positions, num_keys)
    selected = pattern.dense_mask(query, key, mask=mask) & valid_rows(mask, positions)
    if bool((selected & ~visible).any()):
        return f"select() has {place(selected & ~visible)}, which the mask hides"
    computed = computed_mask(query, key, pattern=pattern, key_mask=key_mask, query_offset=offset)
    missed = selected & ~plainly_computed(pattern, query, key, mask)
    if bool(missed.any()):
        return f"estimate() leaves out {place(missed)}, which select() has"
    out = sparse_attention(
        query,
        key,
        value,
        pattern=pattern,
        enable_gqa=True,
        key_mask=key_mask,
        query_offset=offset,
    )
    keys, values = (each.double().repeat_interleave(2, 1) for each in (key, value))
    scores = query.double() @ keys.mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~computed, -torch.inf).softmax(-1).nan_to_num()
    error = float((out.double() - weights @ values).abs().max())
    return "" if error <= TOLERANCE else f"the output differs by {error:.1e} from fp64 attention"


def plainly_computed(pattern: Pattern, query: Tensor, key: Tensor, mask: AttentionMask) -> Tensor:
    """The cells of the index that plain torch estimates: bool [B, H, Nq, Nk].

    Kernels estimate in fewer digits, so that of two scores next to each other either may win.
    """
    heads = range(query.shape[1])
    scale = query.shape[-1] ** -0.5
    read = EstimateInputs(query, key, mask, heads, scale)
    if isinstance(pattern, EstimatedPattern):
        index = pattern.estimator.reference(read, [pattern.rule()] * len(heads))
    else:
        index = type(pattern).estimate(read, [pattern] * len(heads))
    sizes = {"batch": query.shape[0], "num_queries": query.shape[2], "num_keys": key.shape[2]}
    return reference.computed_mask(index, mask, **sizes)


def valid_rows(mask: AttentionMask, positions: Tensor) -> Tensor:
    """Queries that are no padding: bool [B or 1, 1, Nq, 1]."""
    if mask.key_mask is None:
        return torch.ones(1, 1, len(positions), 1, dtype=torch.bool)
    return mask.key_mask[:, None, positions, None]


def place(cells: Tensor) -> str:
    """The first of some cells, in words."""
    batch, head, query, key = cells.nonzero()[0].tolist()
    return f"{int(cells.sum())} cells such as query {query}, key {key} (head {head}, row {batch})"
