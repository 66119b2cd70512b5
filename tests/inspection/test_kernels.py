"""Kernels in the debug folder: their source, and what their compilers say of them."""

from __future__ import annotations

import threading

import pytest
import torch

import mpass
from mpass import debug
from mpass.backend import kernel_details
from mpass.lowering import kernel_sources as sources
from mpass.lowering.kernel_sources import KernelSource, announce_source, generated_sources
from tests.helpers.toys import Decoder, compile_toy

pytestmark = pytest.mark.usefixtures("fresh_debug_warnings")


def finish_warm_up():
    """Wait for kernels that earlier tests have started to build in the background."""
    for thread in threading.enumerate():
        if thread.name.startswith("mpass: "):
            thread.join()


def forget_sources(monkeypatch):
    """Let every kernel be announced anew."""
    monkeypatch.setattr(sources, "_sources", {})
    monkeypatch.setattr(sources, "_watchers", [])


def test_kernels_are_written_when_they_are_first_built(tmp_path, monkeypatch):
    forget_sources(monkeypatch)
    announce_source(KernelSource("before", "cpp", "int before;\n", (("flags", "-O3"),)))
    debug.watch_kernels(tmp_path, kernel_details)
    announce_source(KernelSource("after", "python", "after = 1\n"))
    names = {path.name for path in (tmp_path / "kernels").iterdir()}
    assert names == {"before.cpp", "before.txt", "after.py", "after.txt"}
    assert (tmp_path / "kernels" / "before.cpp").read_text() == "int before;\n"
    assert (tmp_path / "kernels" / "before.txt").read_text() == "flags: -O3\n"
    assert [kernel.name for kernel in generated_sources()] == ["before", "after"]


def test_details_of_a_triton_kernel_are_those_of_its_compiler(tmp_path, monkeypatch):
    from mpass.lowering.triton.compile import attention_report, table_spec
    from mpass.lowering.triton.source import load, loaded

    forget_sources(monkeypatch)
    debug.watch_kernels(tmp_path, kernel_details)
    spec = table_spec("sm_90", 64, columns=True)
    loaded.cache_clear()
    load(spec)
    report = attention_report(spec)
    (source,) = (tmp_path / "kernels").glob("*.py")
    compile(source.read_text(), "kernel", "exec")
    lines = source.with_suffix(".txt").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("sparse_attention: ")]
    assert f"sm_90: {report.registers} registers, {report.spill_bytes} bytes spilled" in line
    assert f"{report.shared_bytes} bytes of shared memory" in line
    assert f"{report.matrix_ops['wgmma.mma_async']} wgmma.mma_async" in line


def test_details_of_a_cpu_kernel_are_the_flags_it_was_compiled_with(tmp_path, monkeypatch):
    from torch._inductor import codecache, cpp_builder

    from mpass.lowering.cpu.library import load_library

    finish_warm_up()
    forget_sources(monkeypatch)
    debug.watch_kernels(tmp_path, kernel_details)
    commands = []
    original = cpp_builder.run_compile_cmd

    def keep(command, **settings):
        commands.append(command)
        return original(command, **settings)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", keep)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    codecache.CppCodeCache.cache_clear()
    load_library.cache_clear()
    options = {"pattern": mpass.AShape(16, 64), "dense_above": 2.0}
    torch._dynamo.reset()
    with torch.no_grad():
        compile_toy(Decoder(depth=1).eval(), options)(torch.randn(1, 300, 32))
    assert commands
    for path in (tmp_path / "kernels").glob("*.txt"):
        (line,) = [x for x in path.read_text().splitlines() if x.startswith("compiled by: ")]
        flags = [word for word in line.split()[3:] if word.startswith("-")]
        assert "-O3" in flags and "-fno-strict-aliasing" in flags
        assert any(set(flags) <= set(command.split()) for command in commands), line


def test_a_kernel_whose_compiler_fails_is_still_shown():
    from mpass.inspection.kernels import kernel_details
    from mpass.lowering.triton.spec import TritonKernelSpec

    kernel = KernelSource("k", "python", "", (("a", "b"),), TritonKernelSpec("no_such_template"))
    first, second = kernel_details(kernel)
    assert first == ("a", "b")
    assert second[0] == "compiler" and "no_such_template" in second[1]


def test_kernel_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    forget_sources(monkeypatch)
    (tmp_path / "kernels").write_text("in the way")
    debug.watch_kernels(tmp_path, kernel_details)
    with pytest.warns(debug.DebugFolderWarning) as caught:
        announce_source(KernelSource("one", "cpp", ""))
        announce_source(KernelSource("two", "cpp", ""))
    assert len(caught) == 1
