"""What generated C++ can serve on this machine, and with which instructions."""

from __future__ import annotations

import functools
import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mpass.lowering.cpu.library import compiler_fault
from mpass.lowering.cpu.rates import pairs_are_slower
from mpass.lowering.cpu.spec import INPUT_TYPES, MAX_HEAD_DIM, STRIP, KernelSpec
from mpass.lowering.inputs import AttentionInputs


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why generated C++ cannot serve an attention, in words; None if it can.

    Reads dtypes, devices and static shapes only, so fake tensors will do.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    for tensor in (query, key, value):
        if tensor.device.type != "cpu":
            return f"C++ kernels run on CPU tensors, not {tensor.device.type}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"
    if dtype_name(query.dtype) not in INPUT_TYPES:
        return f"C++ kernels serve {', '.join(INPUT_TYPES)}, not {dtype_name(query.dtype)}"
    for name, size in (("head_dim", query.shape[-1]), ("value dim", value.shape[-1])):
        if not isinstance(size, int):
            return f"{name} is not static"
        if not 1 <= size <= MAX_HEAD_DIM:
            return f"{name} {size} is not in 1..{MAX_HEAD_DIM}"
    reason = machine_reason()
    if reason:
        warn_once(reason)
    return reason


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def machine_reason() -> str | None:
    """Why this machine cannot compile or run the kernels, or None."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return f"C++ kernels are generated for x86-64, not {machine}"
    if sys.platform != "linux":
        return f"C++ kernels are built on Linux, not {sys.platform}"
    if not has("avx2"):
        return "the CPU has no AVX2"
    return compiler_fault("avx2") or None


@functools.cache
def warn_once(reason: str) -> None:
    """One warning per reason, with what to do about it."""
    hint = (
        "install g++ 11 or newer, or point CXX to a compiler"
        if "compiler" in reason
        else "run on an x86-64 Linux machine with AVX2, or on a CUDA device"
    )
    warnings.warn(
        f"mpass runs sparse attention in plain PyTorch, which is slow: {reason}. "
        f"For the fast path, {hint}.",
        stacklevel=3,
    )


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine can run, the fastest first."""
    found = []
    if has("avx512"):
        if has("avx512_bf16"):
            # The kernel must let the process use the tile registers, or using them is fatal.
            if has("amx_tile") and torch.cpu._init_amx():
                found.append("amx")
            found.append("avx512_bf16")
        found.append("avx512")
    return (*found, "avx2")


def has(instructions: str) -> bool:
    """Whether torch finds these instructions here; not if this torch cannot tell."""
    probe = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    if probe is not None:
        return bool(probe())
    listed: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(listed.get(instructions, False))


def kernel_spec(inputs: AttentionInputs) -> KernelSpec:
    """The specialisation of the attention kernel that serves these inputs here."""
    query, value, biased = inputs.query, inputs.value, inputs.distance_bias is not None
    int8 = inputs.int8 and not biased
    spec = attention_spec(query.dtype, query.shape[-1], value.shape[-1], int8=int8)
    return replace(spec, softcap=inputs.softcap > 0, biased=biased)


def attention_spec(dtype: torch.dtype, head_dim: int, value_dim: int, *, int8: bool) -> KernelSpec:
    """The same by what its speed depends on; int8: whether scores may be products of 8 bits."""
    int8 = int8 and not int8_reason(dtype)
    return KernelSpec(
        dtype_name(dtype),
        head_dim,
        value_dim,
        attention_instruction_set(dtype),
        int8=int8,
        halves=int8 and multiplies_halves(dtype),
    )


@functools.cache
def int8_reason(dtype: torch.dtype) -> str:
    """Why scores are not products of 8-bit numbers here, for inputs of a dtype; "" if they are."""
    if dtype_name(dtype) not in INPUT_TYPES:
        return f"scores in 8 bits are for {', '.join(INPUT_TYPES)}, not {dtype_name(dtype)}"
    if "avx512" not in instruction_sets() or not (has("vnni") or has("avx512_vnni")):
        return "the processor has no AVX-512 with VNNI, by which products of 8-bit numbers are fast"
    return machine_reason() or compiler_fault("avx512", "avx512vnni") or ""


@functools.cache
def multiplies_halves(dtype: torch.dtype) -> bool:
    """Whether weights are multiplied with values in fp16 where scores are in 8 bits.

    Only instead of fp32: products of bf16 pairs are as fast, and those of AMX faster.
    """
    if attention_instruction_set(dtype) != "avx512":
        return False
    return not fp16_fault()


@functools.cache
def fp16_fault() -> str:
    """Why this machine cannot multiply half-precision numbers; "" if it can."""
    if not (has("avx512") and has("avx512_fp16")):
        return "the processor has no AVX512-FP16"
    fault = compiler_fault("avx512_fp16")
    return f"{fault}: AVX512-FP16 needs g++ 12 or newer" if fault else ""


def backward_spec(inputs: AttentionInputs) -> KernelSpec:
    """The specialisation of the backward kernel that serves these inputs here.

    Its tiles are no whole AMX tiles: machines that have those take products of pairs.
    """
    spec = kernel_spec(replace(inputs, int8=False))
    chosen = "avx512_bf16" if spec.amx else spec.instruction_set
    return replace(spec, kernel="attention_backward", instruction_set=chosen)


def made_for(spec: KernelSpec, dtype: torch.dtype, head_dim: int, softcap: bool) -> bool:
    """Whether a kernel serves an attention of this kind here."""
    estimator = not spec.attends  # these multiply in bf16 whatever the dtype
    found = (spec.input, spec.head_dim, spec.instruction_set, spec.strip)
    if estimator:
        chosen = best_instruction_set(torch.bfloat16)
    else:
        chosen = attention_instruction_set(dtype)
    wanted = (dtype_name(dtype), head_dim, chosen, STRIP)
    return found == wanted and (estimator or spec.softcap == softcap)


def estimate_spec(query: Tensor) -> KernelSpec:
    """The specialisation of the estimators that serves this query here, without a bias."""
    size = query.shape[-1]
    chosen = best_instruction_set(torch.bfloat16)  # see KernelSpec.bf16
    return KernelSpec(dtype_name(query.dtype), size, size, chosen, kernel="fixed_budget")


@functools.cache
def best_instruction_set(dtype: torch.dtype) -> str:
    """The fastest set that the compiler knows as well.

    Only bf16 has products in hardware; the rest is fp32 arithmetic.
    """
    sets = instruction_sets()
    if dtype != torch.bfloat16:
        sets = tuple(name for name in sets if name in ("avx512", "avx2"))
    return next((name for name in sets if not compiler_fault(name)), "avx2")


@functools.cache
def attention_instruction_set(dtype: torch.dtype) -> str:
    """The set with which attention in a dtype is fastest.

    Where this processor is slower at pairs of bf16 than in fp32, that is fp32 arithmetic.
    Estimators keep the pairs: with them come products of 8-bit numbers.
    """
    chosen = best_instruction_set(dtype)
    return "avx512" if chosen == "avx512_bf16" and pairs_are_slower() else chosen
