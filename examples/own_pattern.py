"""A pattern of one's own: every `step`-th key block before the query's, and the query's own.

    python examples/own_pattern.py
    mpass pattern check examples/own_pattern.py:Comb

The index that a pattern estimates is all that the kernels need. The command draws it and holds it
against the pattern's meaning, its output against fp64 attention, and its cost formula.
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from torch import nn

import mpass
from mpass.lowering.index import AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.reference.block_lists import allowed_blocks, list_index
from mpass.patterns.base import HEAD_DIM, LENGTH, register_pattern
from mpass.patterns.base.checks import check_blocks
from mpass.patterns.base.scored import ListEstimator, ListPattern


@dataclass(frozen=True)
class Rule:
    """What the estimator knows of one head."""

    step: int
    max_blocks: int


def width(rules: list[Rule]) -> IndexWidth:
    """How long lists are: from the parameters alone."""
    return IndexWidth(max_blocks=max(rule.max_blocks for rule in rules))


def index(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: AttentionMask,
    heads: list[int],
    rules: list[Rule],
    *,
    scale: float,
) -> SparseIndex:
    """The key blocks of each query block, a head after the other."""

    def kept(i: int, blocks: torch.Tensor) -> torch.Tensor:
        allowed = allowed_blocks(mask, blocks, key.shape[2])
        distance = blocks[:, None] - torch.arange(allowed.shape[1], device=blocks.device)
        near = distance < rules[i].step * rules[i].max_blocks
        return ((distance % rules[i].step == 0) & near & allowed).expand(len(query), -1, -1)

    return list_index(query, mask, len(heads), width(rules), kept)


@register_pattern
@dataclass(frozen=True)
class Comb(ListPattern):
    """Keep every `step`-th block; max_blocks: as many as a list holds."""

    step: int = 2
    max_blocks: int = 64

    name: ClassVar[str] = "comb"
    estimator: ClassVar[ListEstimator] = ListEstimator(index, width, Rule)

    def __post_init__(self) -> None:
        check_blocks(self)

    def cost(self) -> sympy.Expr:
        """Multiply-adds of one head: two products over every `step`-th key, and the diagonal."""
        return LENGTH**2 / self.step * HEAD_DIM + 128 * LENGTH * HEAD_DIM


class Attention(nn.Module):
    """One layer's attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, H, N, D]."""
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def main(length: str = "4096") -> None:
    """Compile attention with the pattern, by its name, and print what was computed."""
    torch.manual_seed(0)
    model = mpass.compile(Attention(), pattern="comb(4)", min_seq_len=512, dense_above=1.0)
    x = torch.randn(1, 4, int(length), 64)
    with torch.no_grad(), mpass.record() as log:
        model(x)
    print(mpass.last_report())
    print(f"density: {log.density():.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
