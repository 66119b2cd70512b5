"""Scores of any size: generated C++ gives what fp64 attention over the same cells gives.

Beyond 2^24 neighbouring floats are more than one apart, so a softmax is the key with the greatest
score, where there is one: rows whose greatest score is clear must have its value.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import mpass
from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import registered_patterns
from tests.helpers.cpu_cases import DTYPES, TOLERANCE, needs_kernels, random_index, serves
from tests.helpers.huge_scores import ROWS, SIZES, clear_rows, huge_inputs
from tests.helpers.pairwise import pairwise
from tests.helpers.truth import dense_attention

pytestmark = needs_kernels

N = 600
NUMBERS = ("plain", "sinks", "softcap", "window and padding", "negative scale", "large scale")
SCALES = {"negative scale": -0.3, "large scale": 7.0}


def check(
    spec: KernelSpec,
    dtype: torch.dtype,
    size: float,
    rows: str,
    numbers: str,
    tolerance: float | None = None,
) -> None:
    """Compare the kernel with fp64 in the rows that are clear; no row may be NaN."""
    inputs = huge_inputs(dtype, size, rows, num_keys=N)
    padded = numbers == "window and padding"
    key_mask = (torch.arange(N) >= 70)[None] if padded else None
    mask = AttentionMask(window=150 if padded else 0, key_mask=key_mask)
    generator = torch.Generator().manual_seed(1)
    sizes = {"batch": 1, "num_queries": N, "num_keys": N}
    index = random_index(generator, head_slots=(0, -1), mask=mask, density=0.5, **sizes)
    numeric = {
        "scale": SCALES.get(numbers, 0.3),
        "softcap": 30.0 if numbers == "softcap" else 0.0,
        "sink_logits": torch.tensor([0.5, 3e9]) if numbers == "sinks" else None,
    }
    found = run_attention(spec, AttentionInputs(*inputs, mask, **numeric), index).double()
    wide = AttentionInputs(*(tensor.double() for tensor in inputs), mask, **numeric)
    expected = reference.sparse_attention(wide, index)
    assert found.isfinite().all()
    clear = clear_rows(wide, reference.computed_mask(index, mask, **sizes))
    assert clear.double().mean() > 0.25
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    assert (found - expected).abs().amax(-1)[clear].max() <= allowed


CASES = pairwise(
    SIZES,
    ROWS,
    NUMBERS,
    list(product(DTYPES, instruction_sets())),
    allowed=lambda size, rows, numbers, kernel: serves(*kernel),
)


@pytest.mark.parametrize(("size", "rows", "numbers", "kernel"), CASES, ids=str)
def test_attention_of_huge_scores_equals_fp64(size, rows, numbers, kernel) -> None:
    dtype, instruction_set = kernel
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, softcap=numbers == "softcap")
    check(spec, dtype, size, rows, numbers)


PATTERNS = [cls.examples()[0] for _, cls in sorted(registered_patterns().items())]


@pytest.mark.parametrize("size", [1e8, 1e30])
@pytest.mark.parametrize("rows", ["mixed", "negative"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_find_keys_among_huge_scores(pattern, rows, size) -> None:
    query, key, value = huge_inputs(torch.float32, size, rows, num_keys=400)
    found = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    cells = mpass.computed_mask(query, key, pattern=pattern)
    wide = (query.double(), key.double(), value.double())
    inputs = AttentionInputs(*wide, AttentionMask(), query.shape[-1] ** -0.5)
    assert cells.any(-1).all() and found.isfinite().all()
    clear = clear_rows(inputs, cells)
    expected = dense_attention(query, key, value, cells, inputs.scale)
    assert (found - expected).abs().amax(-1)[clear].max() <= TOLERANCE[torch.float32]
