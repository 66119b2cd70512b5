"""What the compilers make of generated kernels: flags, registers, spills, shared memory.

Asked only by who shows kernels: each Triton kernel is compiled once more for that, without a GPU.
"""

from __future__ import annotations

import functools

from mpass.errors import in_one_line
from mpass.lowering.cpu.library import compile_command
from mpass.lowering.cpu.spec import KernelSpec as CppSpec
from mpass.lowering.kernel_sources import KernelSource
from mpass.lowering.triton.spec import SHARED_MEMORY, TritonKernelSpec


def kernel_details(kernel: KernelSource) -> tuple[tuple[str, str], ...]:
    """Pairs of names and values: what a kernel was made for, and what its compiler says of it."""
    try:
        return kernel.details + compiler_details(kernel.spec)
    except Exception as error:  # a kernel that cannot be compiled here is still worth showing
        return (*kernel.details, ("compiler", f"cannot be asked: {in_one_line(error)}"))


def compiler_details(spec: object) -> tuple[tuple[str, str], ...]:
    """The compile command of a C++ spec; what each kernel of a Triton spec takes of its chip."""
    if isinstance(spec, CppSpec):
        return (("compiled by", compile_command(spec)),)
    if isinstance(spec, TritonKernelSpec):
        return resources(spec)
    return ()


@functools.lru_cache(maxsize=256)
def resources(spec: TritonKernelSpec) -> tuple[tuple[str, str], ...]:
    """A pair per kernel of a module: its name, and its registers, spills and shared memory."""
    from mpass.lowering.triton.compile import compile_kernel, entry_points

    pairs = []
    for name in entry_points(spec):
        report = compile_kernel(spec, name)
        matrix = ", ".join(f"{n} {op}" for op, n in report.matrix_ops.items() if n)
        programs = report.programs(SHARED_MEMORY[report.target])
        words = (
            f"{report.target}: {report.registers} registers, {report.spill_bytes} bytes spilled, "
            f"{report.shared_bytes} bytes of shared memory, {programs} programs per multiprocessor"
        )
        pairs.append((name, f"{words}, {matrix}" if matrix else words))
    return tuple(pairs)
