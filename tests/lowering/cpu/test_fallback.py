"""Machines that cannot build or run the C++: plain torch, the right result, and one warning."""

from __future__ import annotations

import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpass.lowering.cpu import library, rates, support
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from tests.helpers.cpu_cases import needs_kernels
from tests.helpers.processes import run_python

QUERY = torch.zeros(1, 2, 8, 16)
INPUTS = AttentionInputs(QUERY, QUERY, QUERY, AttentionMask(), 1.0)

SCRIPT = """
import warnings, torch, mpass
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 16) for _ in "qkv")
    for _ in range(3):
        found = mpass.sparse_attention(query, key, value, pattern=mpass.VerticalSlash(4, 8))
        union = mpass.sparse_attention(query, key, value, pattern="union")
    mask = mpass.computed_mask(query, key, pattern=mpass.VerticalSlash(4, 8))
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
assert (found - truth).abs().max() < 1e-5
for warning in caught:
    if "mpass" in str(warning.message):
        print(warning.message)
"""


@pytest.fixture(autouse=True)
def fresh_probes() -> Iterator[None]:
    probes = (
        support.machine_reason,
        support.instruction_sets,
        support.best_instruction_set,
        support.attention_instruction_set,
        rates.pairs_are_slower,
        support.warn_once,
        library.compiler_fault,
    )
    for probe in probes:
        probe.cache_clear()
    yield
    for probe in probes:
        probe.cache_clear()


def run_script(tmp_path: Path, **environment: str) -> list[str]:
    """The warnings of a new process with an empty disk cache."""
    cache = str(tmp_path / "cache")
    return run_python(
        "-c", SCRIPT, TORCHINDUCTOR_CACHE_DIR=cache, **environment
    ).stdout.splitlines()


def failing_compiler(folder: Path) -> str:
    """A compiler that says its version and cannot do anything else."""
    folder.mkdir()
    path = folder / "g++"
    path.write_text(
        '#!/bin/sh\ncase "$1" in *version*) echo "g++ (GCC) 12.2.0"; exit 0;; esac\n'
        'echo "error: no such instruction" >&2\nexit 1\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_kernels
def test_without_a_compiler_plain_torch_serves_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = run_script(tmp_path, PATH=str(tmp_path / "empty"), CXX=str(tmp_path / "none"))
    assert len(found) == 1
    assert "plain PyTorch, which is slow" in found[0]
    assert "install g++ 11 or newer, or point CXX to a compiler" in found[0]


@needs_kernels
def test_a_compiler_that_fails_is_no_compiler(tmp_path: Path) -> None:
    found = run_script(tmp_path, CXX=failing_compiler(tmp_path / "bin"))
    assert len(found) == 1
    assert "the C++ compiler failed" in found[0]
    assert "point CXX to a compiler" in found[0]


def warnings_of_choosing(times: int = 3) -> tuple[str, list[str]]:
    """The lowering that serves and what is said about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lowering = [choose_lowering(INPUTS) for _ in range(times)][-1]
    return lowering.name, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("machine", "platform", "words"),
    [
        ("aarch64", "linux", "for x86-64, not aarch64"),
        ("arm64", "darwin", "for x86-64, not arm64"),
        ("x86_64", "win32", "on Linux, not win32"),
    ],
)
def test_other_machines_take_plain_torch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, machine: str, platform: str, words: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", platform)
    name, messages = warnings_of_choosing()
    assert name == "reference"
    assert len(messages) == 1
    assert words in messages[0]
    assert "x86-64 Linux machine with AVX2" in messages[0]


@pytest.mark.parametrize("present", [False, None], ids=["says-no", "cannot-tell"])
def test_a_cpu_without_avx2_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch, present: bool | None
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        if present is None:
            monkeypatch.delattr(torch.cpu, f"_is_{name}_supported")
        else:
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    name, messages = warnings_of_choosing()
    assert name == "reference"
    assert ["no AVX2" in message for message in messages] == [True]


@pytest.mark.parametrize(
    ("present", "dtype", "expected"),
    [
        ({"avx2"}, torch.bfloat16, "avx2"),
        ({"avx2", "avx512"}, torch.bfloat16, "avx512"),
        ({"avx2", "avx512", "avx512_bf16"}, torch.bfloat16, "avx512_bf16"),
        ({"avx2", "avx512", "avx512_bf16"}, torch.float16, "avx512"),
        ({"avx2", "avx512", "avx512_bf16", "amx_tile"}, torch.bfloat16, "amx"),
        ({"avx2", "amx_tile"}, torch.bfloat16, "avx2"),
    ],
)
def test_the_fastest_instructions_that_are_there_are_used(
    monkeypatch: pytest.MonkeyPatch, present: set[str], dtype: torch.dtype, expected: str
) -> None:
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in present)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(support, "compiler_fault", lambda name: "")
    assert support.best_instruction_set(dtype) == expected


def test_tiles_that_the_system_refuses_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("avx2", "avx512", "avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert support.instruction_sets() == ("avx512_bf16", "avx512", "avx2")


@pytest.mark.parametrize(
    ("slower", "best", "expected"),
    [
        (True, "avx512_bf16", "avx512"),
        (False, "avx512_bf16", "avx512_bf16"),
        (True, "amx", "amx"),
        (True, "avx2", "avx2"),
    ],
)
def test_attention_is_in_fp32_where_pairs_of_bf16_are_slower(
    monkeypatch: pytest.MonkeyPatch, slower: bool, best: str, expected: str
) -> None:
    monkeypatch.setattr(support, "best_instruction_set", lambda dtype: best)
    monkeypatch.setattr(support, "pairs_are_slower", lambda: slower)
    assert support.attention_instruction_set.__wrapped__(torch.bfloat16) == expected


@pytest.mark.skipif(
    "avx512_bf16" not in support.instruction_sets(), reason="the processor has no pairs of bf16"
)
def test_rates_of_products_are_those_of_a_processor() -> None:
    """A pair takes from half the time of its products in fp32 to a few times it, always alike."""
    flags = library.INSTRUCTION_FLAGS["avx512_bf16"]
    probe = library.compile_source(rates.PROBE_SOURCE, extra_flags=flags)
    found = [rates.pair_ticks(probe) for _ in range(3)]
    assert all(0.3 < ticks < 8 for ticks in found)
    assert len({ticks > rates.NOT_FASTER for ticks in found}) == 1


def test_instructions_that_the_compiler_does_not_know_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(support, "instruction_sets", lambda: ("amx", "avx512_bf16", "avx2"))
    monkeypatch.setattr(
        support, "compiler_fault", lambda name: "unknown flag" if name == "amx" else ""
    )
    assert support.best_instruction_set(torch.bfloat16) == "avx512_bf16"
