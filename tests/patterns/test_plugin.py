"""A pattern of another package, found through its entry point, works like any other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = '''
"""Comb: the query block's own, and every `step`-th key block before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy
import torch
from mpass.lowering.reference.block_lists import allowed_blocks, list_index
from mpass.lowering.index import IndexWidth
from mpass.patterns.base import HEAD_DIM, LENGTH, register_pattern
from mpass.patterns.base.scored import ListEstimator, ListPattern
from mpass.patterns.base.checks import check_blocks


@dataclass(frozen=True)
class Rule:
    step: int
    max_blocks: int


def width(rules):
    return IndexWidth(max_blocks=max(rule.max_blocks for rule in rules))


def index(query, key, mask, heads, rules, *, scale):
    def kept(i, blocks):
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
        return LENGTH**2 / self.step * HEAD_DIM
'''

USER = """
import torch

import mpass
from mpass.errors import PatternValueError
from mpass.config.pattern_text import parse_pattern
from mpass.patterns.base import registered_patterns

assert "comb" in registered_patterns()


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )


generator = torch.Generator().manual_seed(0)
query = torch.randn(2, 4, 700, 32, generator=generator)
key, value = torch.randn(2, 2, 2, 700, 32, generator=generator)
options = {"pattern": "comb", "min_seq_len": 0, "dense_above": 1.0, "inner_backend": "aot_eager"}
compiled = torch.compile(Attention(), backend="minference", options=options, fullgraph=True)
with mpass.record() as log:
    out = compiled(query, key, value)
assert [call.lowering for call in log.calls][0] != "dense", log.calls

blocks = torch.arange(700) // 64
keep = (blocks[:, None] - blocks) % 2 == 0
cells = keep & torch.ones(700, 700).tril().bool()
assert torch.equal(mpass.computed_mask(query, key, pattern="comb")[0, 0], cells)
scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 32**-0.5
truth = scores.masked_fill(~cells, -torch.inf).softmax(-1) @ value.double().repeat_interleave(2, 1)
assert (out - truth).abs().max() < 1e-5
assert abs(float(log.calls[0].density.mean()) - float(cells.sum()) / (700 * 701 / 2)) < 1e-9

config = mpass.SparseConfig(parse_pattern("comb(step=3)"))
assert mpass.SparseConfig.from_json(config.to_json()) == config
try:
    parse_pattern("comb(step=0)")
    raise AssertionError("a bad parameter was taken")
except PatternValueError as error:
    assert "step is 0" in str(error)
assert "comb" in str(mpass.last_report())
"""


def test_a_pattern_of_another_package_works_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "combs.py").write_text(PLUGIN)
    installed = tmp_path / "combs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: combs\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[mpass.patterns]\ncomb = combs\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", USER],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
