"""A pattern of another package, found through its entry point, works like any other."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import pytest

from mpass.errors import PatternClassError, PatternNameTakenError
from mpass.patterns.base import Pattern, register_pattern, registered_patterns
from mpass.patterns.base.scored import ListPattern
from mpass.patterns.block_max import BlockMax

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


MODES = """
from dataclasses import dataclass
from typing import ClassVar, Literal

from combs import Comb
from mpass.patterns.base import register_pattern


@register_pattern
@dataclass(frozen=True)
class Modes(Comb):
    mode: Literal["near", "far"] = "near"
    level: Literal[1, 2] = 1

    name: ClassVar[str] = "modes"

    def rule(self):
        return self.estimator.rule(self.step + (self.mode == "far"), self.max_blocks)
"""
"""Annotations are no text here, and two are Literals."""

MODES_USER = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mpass
    import torch
    from mpass.config.json_format import parse_config
    from mpass.config.pattern_text import parse_pattern
    from mpass.errors import ConfigFileError, PatternLoadError, PatternValueError
    from mpass.patterns.base import find_pattern, registered_patterns

    assert {"modes", "comb", "union"} <= set(registered_patterns())
    registered_patterns()
told = [str(item.message) for item in caught if "entry point" in str(item.message)]
assert len(told) == 2, told
assert "'broken' (no_such_module) of package combs" in told[0] and "No module named" in told[0]
assert "'taken'" in told[1] and "is taken by mpass.patterns.union.VerticalBlock" in told[1], told[1]
assert find_pattern("union").__module__ == "mpass.patterns.union"
try:
    torch.compile(torch.nn.ReLU(), backend="minference", options={"pattern": "broken"})(
        torch.zeros(1)
    )
    raise AssertionError("a pattern that is not there was taken")
except Exception as error:
    assert "no_such_module" in str(error), error

pattern = parse_pattern("modes(mode='far')")
assert str(pattern) == "modes(2, 64, 'far', 1)" and parse_pattern(str(pattern)) == pattern
config = mpass.SparseConfig(pattern)
assert mpass.SparseConfig.from_json(config.to_json()) == config
for wrong in ("'sideways'", "1", "True"):
    try:
        parse_pattern(f"modes(mode={wrong})")
        raise AssertionError("a value outside of the Literal was taken")
    except PatternValueError as error:
        assert "allowed: one of 'near', 'far'" in str(error)
try:
    parse_config(config.to_json().replace('"level": 1', '"level": 3'), "test")
    raise AssertionError("a value outside of the Literal was taken")
except ConfigFileError as error:
    assert "level is 3; allowed: one of 1, 2" in str(error)


def attend(query):
    return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)


query = torch.randn(1, 2, 700, 32)
options = {"pattern": pattern, "min_seq_len": 0, "dense_above": 1.0}
out = torch.compile(attend, backend="minference", options=options)(query)
cells = mpass.computed_mask(query, query, pattern=parse_pattern("comb(step=3)"))
expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=cells)
assert (out - expected).abs().max() < 1e-4
"""


def test_a_pattern_of_another_package_works_end_to_end(tmp_path: Path) -> None:
    use_plugins(tmp_path, USER, {"comb": "combs"})


def test_plugins_may_have_literals_and_a_broken_one_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "modes.py").write_text(MODES)
    (tmp_path / "taken.py").write_text(PLUGIN.replace('"comb"', '"union"'))
    entries = {"broken": "no_such_module", "comb": "combs", "modes": "modes", "taken": "taken"}
    use_plugins(tmp_path, MODES_USER, entries)


def use_plugins(folder: Path, program: str, entries: dict[str, str]) -> None:
    """Run a program beside an installed package with these entry points."""
    (folder / "combs.py").write_text(PLUGIN)
    installed = folder / "combs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: combs\nVersion: 1.0\n")
    lines = "".join(f"{name} = {module}\n" for name, module in entries.items())
    (installed / "entry_points.txt").write_text(f"[mpass.patterns]\n{lines}")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def make_class(fields: dict[str, object], **members: object) -> type[Pattern]:
    """A pattern class with these annotations, which are values, and members."""
    words = {"name": "made_up", "__annotations__": fields, "__module__": __name__}
    return dataclass(frozen=True)(type("MadeUp", (BlockMax,), words | members))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (make_class({}, name=""), ["it has no name", 'name: ClassVar[str] = "my_pattern"']),
        (make_class({}, name="a b"), ["'a b' cannot be the name of an op"]),
        (make_class({"sizes": list}, sizes=()), ["'sizes' has the type list", "int, float, bool"]),
        (make_class({"size": "Tensor"}, size=1), ["'size' has the type Tensor", "Literal"]),
        (make_class({"way": Literal[1, "a"]}, way=1), ["'way' has the type Literal[1, 'a']"]),
        (type("MadeUp", (BlockMax,), {"name": "made_up"}), ["it is not a dataclass"]),
        (
            dataclass(frozen=True)(type("MadeUp", (Pattern,), {"name": "made_up"})),
            ["does not define estimate, width, select, cost"],
        ),
        (
            dataclass(frozen=True)(type("MadeUp", (ListPattern,), {"name": "made_up"})),
            ["does not define estimator, cost", "a ListPattern needs"],
        ),
        (
            make_dataclass(
                "MadeUp",
                [("size", int)],
                bases=(Pattern,),
                namespace={"name": "made_up"},
                frozen=True,
            ),
            ["field 'size' has no default"],
        ),
    ],
)
def test_a_class_that_is_incomplete_is_refused_in_words(cls: type[Pattern], words: list[str]):
    with pytest.raises(PatternClassError) as caught:
        register_pattern(cls)
    assert "MadeUp: " in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "made_up" not in registered_patterns()


def test_a_name_that_is_taken_is_refused_with_both_owners() -> None:
    with pytest.raises(PatternNameTakenError) as caught:
        register_pattern(make_class({}, name="block_max"))
    assert f"{__name__}.MadeUp" in str(caught.value)
    assert "taken by mpass.patterns.block_max.BlockMax" in str(caught.value)
    with pytest.raises(PatternNameTakenError, match="minference::sparse_attention"):
        register_pattern(make_class({}, name="sparse_attention"))
    assert registered_patterns()["block_max"] is BlockMax


def test_a_module_may_be_loaded_again() -> None:
    module = sys.modules[BlockMax.__module__]
    try:
        importlib.reload(module)
        assert registered_patterns()["block_max"] is module.BlockMax is not BlockMax
    finally:
        module.BlockMax = register_pattern(BlockMax)
