"""Every spelling of attention that is found; a new one is a file of its own and a line here.

The matcher and the inliner of sub-graphs both read this table.
"""

from __future__ import annotations

from importlib import import_module

from mpass.match.spelling import Spelling

MODULES = (
    "sdpa",
    "eager",
    "flex_attention",
    "multi_head_attention",
    "minference_op",
)
"""The files of this package that each describe a spelling, as their `SPELLING`."""

SPELLINGS: tuple[Spelling, ...] = tuple(
    import_module(f"mpass.match.{name}").SPELLING for name in MODULES
)
