"""Which patterns and sizes a calibration tries if it is not told."""

from __future__ import annotations

from mpass.patterns.a_shape import AShape
from mpass.patterns.base import Pattern, registered_patterns
from mpass.patterns.block_sparse import BlockSparse
from mpass.patterns.dense import Dense
from mpass.patterns.union import Union
from mpass.patterns.vertical_slash import VerticalSlash

TABLE_7 = (
    AShape(1024, 4096),
    *(VerticalSlash(*sizes) for sizes in ((30, 2048), (100, 1800), (500, 1500), (3000, 200))),
    BlockSparse(100),
)
"""The search space of MInference's paper (arXiv 2407.02490, Table 7)."""

RELEASED = tuple(
    VerticalSlash(*sizes)
    for sizes in ((30, 800), (100, 800), (500, 700), (1000, 1024), (3500, 100), (1000, 6096))
)
"""Sizes that MInference's released code and files name."""

UNION_SHARES = (
    (0.5, 0.5),
    (0.5, 0.25),
    (0.7, 0.25),
    (0.7, 0.1),
    (0.8, 0.05),
    (0.8, 0.02),
    (0.9, 0.02),
    (0.95, 0.01),
)
"""`mass` and `row_share` of `union`, from the cheapest to nearly everything."""

UNION_ROWS = ((0.05, 256), (0.03, 256), (0.03, 512), (0.015, 512))
"""`row_share` and `columns` of `union` between them, where single rows decide more than the sum."""


def default_candidates() -> tuple[Pattern, ...]:
    """MInference's, sizes between them, and every other pattern as it is by default."""
    listed: list[Pattern] = [Dense(), *TABLE_7, *RELEASED]
    listed += [AShape(64, 256), AShape(128, 1024)]
    listed += [BlockSparse(count) for count in (8, 16, 32)]
    listed += [
        Union(mass=mass, row_share=share, columns=columns)
        for mass, share in UNION_SHARES
        for columns in (64, 512)
    ]
    listed += [Union(row_share=share, columns=columns) for share, columns in UNION_ROWS]
    known = {type(pattern) for pattern in listed}
    others = [cls() for cls in registered_patterns().values() if cls not in known]
    return tuple(listed + others)
