"""Every reason to stay dense is named by the report, with the line of the user's model.

`test_no_reason_is_without_a_case` reads the reasons out of the sources, so a new one needs a case.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mpass
from mpass.inspection.explanation import Explanation, explain
from tests.helpers import reason_cases as masks
from tests.helpers.reason_cases import DYNAMIC_MASKS, MASKS, Inputs
from tests.helpers.reason_inputs import tensors
from tests.helpers.reason_programs import PROGRAMS

FOLDER = Path(mpass.__file__).parent
OPTIONS = {"min_seq_len": 128, "read_masks": False}
CASES = sorted(MASKS | DYNAMIC_MASKS | PROGRAMS)

SOURCES = sorted(
    [
        *FOLDER.glob("match/*.py"),
        *FOLDER.glob("masks/**/*.py"),
        *(FOLDER / "plan.py", FOLDER / "graph" / "dtypes.py"),
    ]
)
"""Where reasons come from."""

NO_REASONS = {
    "a bias per key is added to the scores",  # of a proof
    "a bias by distance is added to the scores",
    "each query keeps the {} keys with the largest bias that it may see",
    "is_causal=True: k <= q",
    "no mask: every key is seen",
    "every key is seen",
    "causal: k <= q",
    "causal: k <= q + {}",
    "window of {}: q - k < {}",
    "window of {} both ways: |q - k| < {}",
    "valid keys: k < {}",
    "padding: {}",
    "always true: {}",
    "no attention inside",
    "{} ({} now)",
    " at {}",
    "told by attn_implementation='minference'",
    "lists of blocks: those of mask_mod here, checked in each call",
    "rows that see no key are padding: zeros, not the mean of all values",
    "rows that see no key are the mean of all values, looked for in each call",
    "matching attention ({})",
    "opening attention",
    "looking for other attention",
}
"""Texts of those files that are proofs or parts of reasons."""

UNREACHED = {
    # A mask is only read where nothing else keeps the attention dense, and that is what is shown.
    "not read: the site stays dense": "another reason is shown",
    "shapes are not those of an attention": "another reason is shown",
    "its mask is not proven": "every proof that fails says why",
    # torch refuses these calls itself.
    "mask {} has {} dimensions": "refused by torch",
    "mask {} of shape {} does not fit the scores": "refused by torch",
    "head_dim of query ({}) and key ({}) differ": "refused by torch",
    "{} query heads are no multiple of {} key/value heads": "refused by torch",
    "{} query heads do not divide over {} kv heads": "refused by torch",
    "{} query heads and {} key heads without enable_gqa": "refused by torch",
    "key and value differ in length: {} and {}": "refused by torch",
    "query, key and value differ in dtype: {}, {}, {}": "refused by torch",
    "slice with a step that is not positive": "refused by torch",
    "cat of no list": "refused by torch",
    "cat of nothing": "an empty mask is refused by torch",
    "the BlockMask is for another length": "refused by torch",
    "mask_mod does not return a condition": "refused by torch",
    "argument {} is no tensor": "refused by torch",
    "argument {} is missing": "refused by torch",
    "cat of what is no tensor": "refused by torch",
    "{} is no tensor": "refused by torch",
    "number of valid keys {} might not be positive": "a guard says that it is",
    "slice of the last {} of {}, which may be fewer": "Dynamo guards it",
    # Dynamo's graphs do not have these; torch.export's and graphs made by hand may.
    "is_causal is not a constant": "Dynamo guards it",
    "dimension is not a constant": "Dynamo guards it",
    "indexing by True or False": "Dynamo writes it as a new dimension",
    "indexing by a mask": "a graph break: the size of the result is data",
    "slice from a tensor": "Dynamo reads the tensor first",
    "nn.MultiheadAttention's fast path": "Dynamo traces the slow path",
    "{} gives results that are not unpacked": "Dynamo unpacks them",
    "query, key and value are projected inside of one op": "another reason is shown",
    "another layout": "the parts have the layout of torch's functions",
    "{} has a mask of no known type": "refused by torch",
    "the sub-graph's results are not unpacked": "Dynamo's calls return a tuple",
    "inside of a sub-graph": "what Dynamo calls has a reason of its own to be kept",
    "flex_attention's output is unpacked more than once": "Dynamo unpacks once",
    "mask_mod is not in the graph": "Dynamo lifts it into the graph",
    "the numbers of heads and head_dim must be known when compiling": "matchers say it first",
    # Programs of other tests get these.
    "a size is known at run time only ({}, as Tensor.item() gives it)": "test_hostile.py",
    "no backward kernels are generated for device {}": "test_training.py",
    "trained under a mask that is read at run time: that op has no backward": "test_training.py",
    "what is kept over denoising steps needs a proven mask: {}": "lowering/test_denoising.py",
    "trained under lists of blocks: that op has no backward": "torch refuses it on CPUs",
    "the best keys are chosen by numbers of few digits, of which many are equal": "see "
    "test_top_keys.py",
    "the best keys of each query are found by the host: on CPUs only": "there is no GPU in tests",
    "a bias by distance is not seen by {} on this device": "match/test_distance_bias.py",
    "no gradient of a bias by distance is computed on device {}": "match/test_distance_bias.py",
    "trained where rows without a key get a mean: that op has no backward": "test_training.py",
    "a checkpoint with a context_fn chooses itself what is recomputed": "test_training.py",
    # Arguments that torch refuses, or that nothing but a graph made by hand has.
    "the output is of {}, the query of {}": "torch's products have the dtype of their operands",
    "{} valid keys of {}: none, too many, or fewer than the queries' positions": "the prover "
    "makes a key mask of such a length",
    # Ways out of the prover that no mask is known to take.
    "mask_mod returns a constant": "a BlockMask needs a tensor",
    "comparison of truth values": "comparisons are of numbers by then",
    "{} is not a tensor of the graph": "buffers of a mask_mod are read through the outer graph",
    "no node for {}": "lengths come from the graph's inputs",
    "number of valid keys {} is not a size": "a bound from data is no valid length",
    "query offset {} is not a size": "lengths come from the graph's inputs",
}
"""Reasons that no program of this test gets, and why."""


def attend(make: masks.Maker, x: Inputs) -> torch.Tensor:
    mask = make(x)
    mask = mask[:, None] if mask.dim() == 1 else mask
    return F.scaled_dot_product_attention(x.query, x.key, x.key, attn_mask=mask)  # here


def mask_inputs(queries: int) -> Inputs:
    n = masks.N
    return Inputs(
        query=torch.randn(1, 4, queries, 16),
        key=torch.randn(1, 4, n, 16),
        ids=torch.arange(n),
        short=torch.arange(n, dtype=torch.int16),
        floats=torch.rand(n),
        flags=torch.ones(1, n, dtype=torch.bool),
        mask=torch.ones(n, n, dtype=torch.bool).tril(),
        size=torch.tensor(3),
    )


@functools.cache
def explained(name: str) -> Explanation:
    """The explanation of a case, compiled once for all tests."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    if name in PROGRAMS:
        case = PROGRAMS[name]
        arguments: Any = tensors(**case.shapes)
        arguments[0].requires_grad_(case.grad)
        for argument, dim in case.dynamic:
            torch._dynamo.mark_dynamic(arguments[argument], dim)
        with torch.set_grad_enabled(case.grad):
            dynamic = case.all_dynamic or None
            options = OPTIONS | case.options
            return explain(case.program, *arguments, options=options, dynamic=dynamic)
    inputs = mask_inputs(128 if name in DYNAMIC_MASKS else masks.N)
    if name in DYNAMIC_MASKS:
        torch._dynamo.mark_dynamic(inputs.query, 2)
        torch._dynamo.mark_dynamic(inputs.key, 2)
    make = (MASKS | DYNAMIC_MASKS)[name][0]
    with torch.no_grad():
        return explain(functools.partial(attend, make), inputs, options=OPTIONS)


def words_of(name: str) -> str:
    """What the reason of a case says."""
    return PROGRAMS[name].words if name in PROGRAMS else (MASKS | DYNAMIC_MASKS)[name][1]


def attention_line(name: str) -> str:
    """`FILE:LINE` of the line of a case's program that is marked."""
    program: Any = PROGRAMS[name].program if name in PROGRAMS else attend
    function: Callable[..., Any] = getattr(program, "forward", program)
    lines, first = inspect.getsourcelines(function)
    (line,) = [first + i for i, text in enumerate(lines) if text.endswith("# here\n")]
    return f"{inspect.getsourcefile(function)}:{line}"


@pytest.mark.parametrize("name", CASES)
def test_reason_is_named_with_the_line_of_the_model(name):
    explanation = explained(name)
    (site,) = explanation.sites
    assert site.status == "dense"
    assert words_of(name) in site.reason
    assert site.source.startswith(f"{attention_line(name)}, in ")
    assert explanation.reasons == {site.reason: 1}
    # The table folds long reasons and paths over lines: compare without its borders.
    table = "".join(character for character in str(explanation) if character not in " │\n")
    assert site.reason.replace(" ", "") in table
    assert site.source.replace(" ", "") in table


def test_an_unproven_mask_names_the_line_that_makes_it():
    reasons = [explained(name).sites[0].reason for name in MASKS]
    made = [r for r in reasons if r.startswith("mask is not proven") and " is an input" not in r]
    assert len(made) > 20
    assert all(f" at {masks.__file__}:" in reason for reason in made)


def reason_texts(path: Path) -> Iterator[str]:
    """Every text of a file that has a space, values written as `{}`; no docstrings or lists."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Names in a row: `"add sub where".split()`, `sympy.symbols("b h q k")`.
            if node.func.attr in ("split", "symbols"):
                skipped |= {id(part) for part in (node.func.value, *node.args)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        text = ""
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "{}" for p in node.values]
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if " " in text:
            yield text


def test_names_of_cases_differ():
    assert len(CASES) == len(MASKS) + len(DYNAMIC_MASKS) + len(PROGRAMS)


def test_no_reason_is_without_a_case():
    reasons = [explained(name).sites[0].reason for name in CASES]
    texts = {text for path in SOURCES for text in reason_texts(path)} - NO_REASONS
    missing = []
    for text in texts:
        pattern = ".+".join(map(re.escape, text.split("{}")))
        if not any(re.search(pattern, reason, re.DOTALL) for reason in reasons):
            missing.append(text)
    assert sorted(missing) == sorted(UNREACHED)
