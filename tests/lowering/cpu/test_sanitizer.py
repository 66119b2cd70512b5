"""Random cases under AddressSanitizer: `pytest -m slow tests/lowering/cpu/test_sanitizer.py`.

The sanitizer must be loaded before Python is, so the cases run in a process of their own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess

import pytest
import torch

from mpass.lowering.cpu import estimators as cpu
from tests.helpers.cpu_cases import REASON, attention_cases, run_case, run_int8_case
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_python


def sanitizer_library() -> str | None:
    """Path of the compiler's libasan, or None."""
    command = [os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"]
    try:
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return path if os.path.isabs(path) else None


@pytest.mark.slow
@pytest.mark.skipif(
    REASON is not None or sanitizer_library() is None,
    reason="needs generated C++ and the compiler's libasan",
)
def test_kernels_stay_inside_of_their_buffers() -> None:
    # No leak check: the interpreter itself leaks by design.
    done = run_python(
        __file__,
        LD_PRELOAD=sanitizer_library() or "",
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=0",
        PYTHONPATH=str(ROOT),
        PYTHONMALLOC="malloc",
    )
    assert "cases passed" in done.stdout


def run_cases() -> None:
    """What the sanitized process does."""
    from hypothesis import HealthCheck, given, settings

    from mpass.lowering.cpu import library
    from mpass.lowering.cpu.linear_half import half_linear_reason, linear_in_half
    from mpass.lowering.index import AttentionMask
    from mpass.lowering.inputs import EstimateInputs
    from mpass.lowering.reference.block_sparse import BlockSparseRule
    from mpass.lowering.reference.vertical_slash import VerticalSlashRule
    from mpass.patterns.flex_prefill import FlexPrefill
    from mpass.patterns.sample_attention import SampleAttention

    top_share = {
        cpu.flex_prefill_index: [
            FlexPrefill(0.6, tau, 65, block_size=64).rule() for tau in (0.0, 1.0)
        ],
        cpu.sample_attention_index: [SampleAttention(0.9, share).rule() for share in (0.05, 1.0)],
    }
    library.EXTRA_FLAGS = (*library.EXTRA_FLAGS, "-fsanitize=address", "-g")
    passed = 0

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=attention_cases())
    def check(case: dict[str, object]) -> None:
        nonlocal passed
        run_case(case)
        run_int8_case(case)
        passed += 1

    check()
    for dtype in (torch.float32, torch.bfloat16):
        for num_queries, num_keys in ((1, 1), (65, 130), (300, 300), (4500, 4500)):
            query = torch.randn(1, 2, num_queries, 40).to(dtype)
            key = torch.randn(1, 1, num_keys, 40).to(dtype)
            mask = AttentionMask(query_offset=num_keys - num_queries)
            given = EstimateInputs(query, key, mask, [0, 1], 0.2)
            slashes = [VerticalSlashRule(60, 110), VerticalSlashRule(99, 150)]
            cpu.vertical_slash_index(given, slashes)
            cpu.block_sparse_index(given, [BlockSparseRule(2, 64), BlockSparseRule(3, 128)])
            key_mask = torch.arange(num_keys).expand(1, -1) % 7 > 0
            for window, real in ((0, None), (100, None), (0, key_mask)):
                hidden = AttentionMask(query_offset=num_keys - num_queries, window=window)
                hidden = dataclasses.replace(hidden, key_mask=real)
                for index, rules in top_share.items():
                    index(dataclasses.replace(given, mask=hidden), rules)
            passed += 1
    if not half_linear_reason(torch.bfloat16):
        for rows, inputs, outputs in ((1, 1, 1), (50, 100, 70), (205, 33, 64), (13, 40000, 130)):
            weight = torch.randn(outputs, inputs).bfloat16()
            linear_in_half(torch.randn(rows, inputs).bfloat16(), weight, torch.randn(outputs))
            passed += 1
    print(f"{passed} cases passed")


if __name__ == "__main__":
    run_cases()
