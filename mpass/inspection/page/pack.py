"""Maps and single queries as text for the page, small enough whatever the model's size."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.inspection.looks import QueryLooks
from mpass.inspection.recall import DECADES, LEVELS, evenly_spaced, linear_levels, log_levels
from mpass.inspection.results import ProfileFields

MAP_CELLS = 4_500_000
"""Cells of all maps of a page; each takes a third of a byte to one byte when it is packed."""

LOOK_BYTES = 1_200_000
"""Bytes of all single queries of a page before they are packed."""


def packed(data: bytes) -> str:
    """Deflated, in base64."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def map_step(profiles: Sequence[ProfileFields]) -> int:
    """How many rows and columns of measured maps make one of the page's."""
    cells = sum(layer.computed.numel() for profile in profiles for layer in profile.layers)
    step = 1
    while cells / step**2 > MAP_CELLS:
        step += 1
    return step


def shrink(computed: Tensor, exact: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Maps uint8 [H, R, R] with `step` rows and columns made one; means, as of what they show."""
    if step == 1:
        return computed, exact
    share = pooled(computed.float() / LEVELS, step)
    mass = torch.where(exact > 0, 10 ** ((exact.float() / LEVELS - 1) * DECADES), 0.0)
    # A cell's mass is a sum over its columns and a mean over its rows.
    return linear_levels(share), log_levels(pooled(mass, step) * step)


def pooled(values: Tensor, step: int) -> Tensor:
    """Means over squares of `step` cells; squares at the edge have fewer."""
    return F.avg_pool2d(values[None], step, ceil_mode=True, count_include_pad=False)[0]


def pack_maps(computed: Tensor, exact: Tensor) -> str:
    """Two maps uint8 [H, R, R] of levels 0..15 as one byte per cell."""
    return packed((computed << 4 | exact).contiguous().numpy().tobytes())


def kept_queries(profiles: Sequence[ProfileFields]) -> list[int] | None:
    """Places of the queries that a page has room for; None if no layer has any."""
    looks = [layer.looks for profile in profiles for layer in profile.layers if layer.looks]
    if not looks:
        return None
    number = min(len(look.queries) for look in looks)
    size = sum(bytes_of_query(look) for look in looks)
    return evenly_spaced(number, max(2, min(number, LOOK_BYTES // max(1, size))))


def bytes_of_query(look: QueryLooks) -> int:
    """Bytes of one query of a layer."""
    heads, _, keys = look.keys.shape
    return heads * (7 * keys + 6 + look.strip_exact.shape[-1])


def pack_looks(looks: QueryLooks, chosen: Sequence[int]) -> dict[str, Any]:
    """Some queries of a layer: sizes in the open, numbers in one text.

    The order is keys and counts in 4 bytes, weights and kept shares in 2 (of 65535), whether a key
    is taken and the strip (taken level above, exact level below) in 1; each [H, Q, ...].
    """
    part = looks.only(chosen)

    def in_two_bytes(shares: Tensor) -> bytes:
        whole = (shares.double().clamp(0, 1) * 65535).round().to(torch.int32)
        return whole.contiguous().numpy().astype("<u2").tobytes()

    def in_four_bytes(numbers: Tensor) -> bytes:
        return numbers.contiguous().numpy().astype("<i4").tobytes()

    data = (
        in_four_bytes(part.keys)
        + in_four_bytes(part.count)
        + in_two_bytes(part.weights)
        + in_two_bytes(part.kept)
        + part.taken.to(torch.uint8).contiguous().numpy().tobytes()
        + (part.strip_taken << 4 | part.strip_exact).contiguous().numpy().tobytes()
    )
    return {
        "queries": list(part.queries),
        "seen": part.seen.tolist(),
        "keys": part.keys.shape[-1],
        "bins": part.strip_exact.shape[-1],
        "data": packed(data),
    }


def pack_tokens(tokens: Sequence[str]) -> str:
    """The texts of tokens, NUL between them."""
    return packed("\0".join(token.replace("\0", " ") for token in tokens).encode())
