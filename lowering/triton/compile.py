"""Compile generated kernels to machine code without a GPU, and read the compiler's own report.

`python -m mpass.lowering.triton.compile sm_90 128` prints the report of the attention kernel.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpass.lowering.triton.assembly import Loop, disassemble, product_loops
from mpass.lowering.triton.source import load
from mpass.lowering.triton.spec import (
    FEATURES,
    Target,
    TritonKernelSpec,
    attention_tile,
    pack_warps,
)

REGISTERS = 65536
"""Registers of one multiprocessor of every NVIDIA chip in the table."""

REGISTER_UNIT = 8
"""A thread's registers are handed out in multiples of this."""

RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes for each program, of sm_80 on."""

POINTERS = {
    "*u8": ("key_mask", "table", "agree"),
    "*fp16": ("parts",),
    "*i64": ("last",),
    "*fp32": (
        *("sinks", "scores", "largest", "weights", "maxima", "sums"),
        *("column_sums", "near_sums", "far_sums", "log_sums", "log_totals"),
        *("steps", "centre"),
        *("lse", "exponents", "dots", "column_grad_key", "column_grad_value"),
    ),
}
"""Types of the pointer arguments of fixed dtype; those not named here are int32."""

SPEC_DTYPE = (
    *("query", "key", "value", "out", "column_key", "column_value"),
    *("rows", "means", "key_means"),
    *("grad_out", "grad_query", "grad_key", "grad_value"),
)
"""Pointer arguments of the spec's dtype."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler says of one kernel on one target.

    registers per thread; spill_bytes: stores and loads of spilled registers together, the larger
    of both; shared_bytes of shared memory per program; matrix_ops: matrix instructions in the
    listing by name; serialized: the compiler runs products of warp groups one by one, for it cannot
    keep their registers apart; programs: how many fit a multiprocessor at once.
    """

    kernel: str
    target: Target
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_ops: dict[str, int]
    serialized: bool = False

    def programs(self, shared_memory: int) -> int:
        """Programs that a multiprocessor holds at once; one may use `shared_memory` bytes."""
        registers = -(-max(1, self.registers) // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS // (registers * 32 * self.num_warps)
        by_shared = (shared_memory + RESERVED_SHARED) // (self.shared_bytes + RESERVED_SHARED)
        return min(by_registers, by_shared, 64 // self.num_warps)


def compile_kernel(spec: TritonKernelSpec, kernel: str, architecture: str = "") -> Report:
    """Compile one kernel of a spec's module; raises what Triton raises.

    architecture: of the chip that it is compiled for, such as "sm_120"; the spec's target if empty.
    """
    compiled = machine_code(spec, kernel, architecture)
    shared = int(compiled.metadata.shared)
    if spec.target.startswith("gfx"):
        return report_amd(spec, kernel, compiled.asm["amdgcn"], shared)
    return report_nvidia(spec, kernel, compiled.asm["ptx"], shared)


def compiled_loops(spec: TritonKernelSpec, kernel: str) -> list[Loop]:
    """The innermost loops of a kernel that multiply matrices, as an NVIDIA target runs them."""
    return product_loops(disassemble(machine_code(spec, kernel).asm["cubin"]))


@functools.lru_cache(maxsize=32)
def machine_code(spec: TritonKernelSpec, kernel: str, architecture: str = "") -> Any:
    """What Triton makes of one kernel for a chip: all its stages by name, as `asm`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load(spec), kernel)
    signature = {p.name: argument_type(spec, p) for p in function.params}
    # Aligned pointers and strides, as the launcher sees them on real tensors.
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in function.params
        if signature[p.name].startswith("*") or "stride" in p.name
    }
    architecture = architecture or spec.target
    if architecture.startswith("gfx"):
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    source = ASTSource(function, signature, {}, aligned)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return triton.compile(source, target=target, options=options)


def argument_type(spec: TritonKernelSpec, parameter: Any) -> str:
    """Triton's type of a kernel argument, by its annotation or its name."""
    name: str = parameter.name
    if parameter.annotation_type:
        return str(parameter.annotation_type)
    if "stride" in name:
        return "i32"
    if name == "means" and spec.int8:
        return "*i8"
    if name in SPEC_DTYPE:
        return f"*{spec.dtype}"
    return next((kind for kind, names in POINTERS.items() if name in names), "*i32")


def report_nvidia(spec: TritonKernelSpec, kernel: str, ptx: str, shared: int) -> Report:
    """Registers and spills from `ptxas -v`, matrix instructions from the PTX."""
    from triton import knobs

    arch = re.search(r"^\.target (\S+?),?\s*(?:debug)?$", ptx, re.MULTILINE)
    name = arch[1].rstrip(",") if arch else spec.target
    blackwell = int(re.sub(r"\D", "", name)) >= 100
    tool = knobs.nvidia.ptxas_blackwell if blackwell else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [tool.path, "-v", f"--gpu-name={name}", str(path), "-o", str(path) + ".cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    text = done.stdout + done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    return Report(
        kernel=kernel,
        target=spec.target,
        num_warps=spec.num_warps,
        registers=max(registers),
        spill_bytes=max(spills, default=0),
        shared_bytes=shared,
        matrix_ops={
            op: len(re.findall(rf"\b{op}", ptx))
            for op in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
        },
        serialized="wgmma.mma_async instructions are serialized" in text,
    )


def report_amd(spec: TritonKernelSpec, kernel: str, assembly: str, shared: int) -> Report:
    """Registers and spills from the code object's metadata."""

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return Report(
        kernel=kernel,
        target=spec.target,
        num_warps=spec.num_warps,
        registers=metadata("vgpr_count"),
        spill_bytes=4 * metadata("vgpr_spill_count"),
        shared_bytes=shared,
        matrix_ops={"v_mfma": len(re.findall(r"\bv_mfma", assembly))},
    )


def entry_points(spec: TritonKernelSpec) -> list[str]:
    """The kernels of a spec's module that are launched: those that no other one calls."""
    from triton.runtime.jit import JITFunction

    functions = {
        name: function
        for name, function in vars(load(spec)).items()
        if isinstance(function, JITFunction)
    }
    return [
        name
        for name in functions
        if not any(
            re.search(rf"\b{name}\(", function.src)
            for other, function in functions.items()
            if other != name
        )
    ]


@functools.cache
def attention_report(spec: TritonKernelSpec) -> Report:
    """The report of an attention kernel."""
    return compile_kernel(spec, "sparse_attention")


def table_spec(target: Target, head_dim: int, *, pack: int = 1, **flags: Any) -> TritonKernelSpec:
    """The attention spec that the table chooses for a chip and head size."""
    features = [name for name in FEATURES if flags.get(name)]
    tile = attention_tile(target, head_dim, flags.get("value_dim", head_dim), features)
    values: dict[str, Any] = {
        "head_dim": head_dim,
        "value_dim": head_dim,
        "tile": tile.keys,
        "pack": pack,
        "num_warps": pack_warps(tile, pack),
        "num_stages": tile.num_stages,
        "target": target,
    }
    return TritonKernelSpec("attention", **(values | flags))


if __name__ == "__main__":
    print(attention_report(table_spec(sys.argv[1], int(sys.argv[2]), columns=True)))  # type: ignore[arg-type]
