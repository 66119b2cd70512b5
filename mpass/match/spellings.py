"""Every spelling of attention that is found; a new one is a file of its own and a line here.

The matcher and the inliner of sub-graphs both read this table.
"""

from __future__ import annotations

from mpass.match import eager, flex_attention, minference_op, multi_head_attention, sdpa
from mpass.match.spelling import Spelling

SPELLINGS: tuple[Spelling, ...] = (
    sdpa.SPELLING,
    eager.SPELLING,
    flex_attention.SPELLING,
    multi_head_attention.SPELLING,
    minference_op.SPELLING,
)
