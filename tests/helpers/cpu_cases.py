"""Random indexes and inputs for the tests of the generated C++."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import (
    best_instruction_set,
    dtype_name,
    has,
    instruction_sets,
    int8_reason,
    unsupported,
)
from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    first_query_block,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from tests.helpers.rotation import part_of_today

PROBE = torch.zeros(1, 1, 1, 64)
REASON = unsupported(AttentionInputs(PROBE, PROBE, PROBE, AttentionMask(), 1.0))
needs_kernels = pytest.mark.skipif(REASON is not None, reason=f"no generated C++ here: {REASON}")

Kernel = tuple[torch.dtype, str]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(dtype: torch.dtype, instruction_set: str) -> bool:
    """Whether attention in a dtype is generated for an instruction set.

    Estimators are for every pair: products are in bf16 where the instruction set has them.
    """
    return dtype == torch.bfloat16 or instruction_set in ("avx512", "avx2")


def kernels_of_today(kernels: Iterable[Kernel]) -> set[Kernel]:
    """Of pairs of dtype and instruction set the best for each dtype, and some of the others.

    The best for bf16 is one of two, by what is timed; both are taken, so that all processes of a
    run have the same tests.
    """
    kernels = list(kernels)
    best = {(dtype, best_instruction_set(dtype)) for dtype in DTYPES}
    best |= {(torch.bfloat16, "avx512")} & set(kernels)
    return best | set(part_of_today([kernel for kernel in kernels if kernel not in best], share=3))


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random_index(
    generator: torch.Generator,
    *,
    batch: int,
    head_slots: tuple[int, ...],
    num_queries: int,
    num_keys: int,
    mask: AttentionMask,
    density: float,
) -> SparseIndex:
    """A valid index with random contents: counts differ between rows, heads and batch rows."""
    blocks = num_query_blocks(num_queries, mask.query_offset)
    first, key_blocks = first_query_block(mask.query_offset), num_key_blocks(num_keys)
    query = torch.empty(batch, len(head_slots), num_queries, 1)
    ahead = 0 if mask.causal else key_blocks - 1  # blocks that lie after a query block
    width = IndexWidth(key_blocks, first + blocks + ahead, min(num_keys, 200))
    index = empty_index(query, blocks, width, head_slots)

    def chance(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def fill(count: torch.Tensor, entries: torch.Tensor, chosen: torch.Tensor) -> None:
        positions = chosen.nonzero().flatten()[: entries.numel()]
        count.fill_(len(positions))
        entries[: len(positions)] = positions

    for b in range(batch):
        for row in range(index.block_count.shape[1]):
            for i in range(blocks):
                chosen = chance(key_blocks) < density
                if mask.causal:
                    chosen[first + i + 1 :] = False
                    chosen[min(first + i, key_blocks - 1)] = True
                fill(index.block_count[b, row, i], index.block_index[b, row, i], chosen)
                if chance(1).item() < 0.1:
                    index.block_count[b, row, i] = ALL_BLOCKS
        for row in range(index.diagonal_count.shape[1]):
            chosen = chance(first + blocks + ahead) < density
            chosen[ahead] = True
            fill(index.diagonal_count[b, row], index.diagonal_index[b, row], chosen)
            index.diagonal_index[b, row, : index.diagonal_count[b, row]] -= ahead
            if chance(1).item() < 0.2:
                index.diagonal_count[b, row] = ALL_DIAGONALS
        for h in range(len(head_slots)):
            chosen = chance(num_keys) < density * chance(1)
            fill(index.column_count[b, h], index.column_index[b, h], chosen)
    return index


def random_inputs(
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    value_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query as projections give it, [B, N, H, D] transposed; value a slice of a wider tensor."""
    query = torch.randn(batch, num_queries, heads, head_dim, generator=generator).transpose(1, 2)
    key = torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator)
    value = torch.randn(batch, kv_heads, num_keys, value_dim + 3, generator=generator)
    return query.to(dtype), key.to(dtype), value.to(dtype)[..., :value_dim]


@contextmanager
def estimating_with(spec: KernelSpec) -> Iterator[None]:
    """Estimators take this specialisation, whatever the query."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpass.lowering.cpu.estimators.estimate_spec", lambda query: spec)
        yield


def assert_matches_reference(
    spec: KernelSpec,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    index: SparseIndex,
    mask: AttentionMask,
    **numbers: object,
) -> None:
    wide = [tensor.double() for tensor in inputs]
    expected = reference.sparse_attention(AttentionInputs(*wide, mask, **numbers), index)
    found = run_attention(spec, AttentionInputs(*inputs, mask, **numbers), index)
    assert found.stride() == reference.empty_output(inputs[0], inputs[2]).stride()
    error = (found.double() - expected).abs().max().item()
    assert error <= TOLERANCE[inputs[0].dtype] * max(1.0, expected.abs().max().item())


@st.composite
def attention_cases(draw: st.DrawFn) -> dict[str, object]:
    causal = draw(st.booleans())
    num_queries = draw(st.integers(1, 300))
    offset = draw(st.integers(0, 200)) if causal else 0
    extra = draw(st.integers(0, 70))
    forms = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    slots, lists, diagonals = [], 0, 0
    for is_list in forms:
        if is_list or not causal:
            slots.append(lists)
            lists += 1
        else:
            diagonals += 1
            slots.append(-diagonals)
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if len(slots) % n == 0]))
    return {
        "causal": causal,
        "num_queries": num_queries,
        "num_keys": offset + num_queries + extra,
        "offset": offset,
        "window": draw(st.sampled_from([0, 0, 1, 63, 64, 65, 130])) if causal else 0,
        "padding": draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0])),
        "slots": tuple(slots),
        "kv_heads": kv_heads,
        "batch": draw(st.integers(1, 2)),
        "density": draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        "seed": draw(st.integers(0, 2**20)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
    }


def make_case(
    case: dict[str, object], generator: torch.Generator, dtype: torch.dtype, *sizes: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], SparseIndex, AttentionMask]:
    """Query, key and value, the index and the mask of a drawn case; sizes: head_dim, value_dim."""
    key_mask = None
    if case["padding"] > 0:
        shape = (case["batch"], case["num_keys"])
        key_mask = torch.rand(shape, generator=generator) >= case["padding"]
    mask = AttentionMask(case["causal"], case["offset"], case["window"], key_mask)
    lengths = {name: case[name] for name in ("batch", "num_queries", "num_keys")}
    slots = case["slots"]
    index = random_index(generator, head_slots=slots, mask=mask, density=case["density"], **lengths)
    heads = {"heads": len(slots), "kv_heads": case["kv_heads"]}
    dims = dict(zip(("head_dim", "value_dim"), sizes, strict=True))
    return random_inputs(generator, dtype, **heads, **dims, **lengths), index, mask


def run_case(case: dict[str, object]) -> None:
    """Compare one drawn case; also what the AddressSanitizer run calls."""
    generator = torch.Generator().manual_seed(case["seed"])
    inputs, index, mask = make_case(case, generator, case["dtype"], 40, 24)
    spec = KernelSpec(dtype_name(case["dtype"]), 40, 24, best_instruction_set(case["dtype"]))
    assert_matches_reference(spec, inputs, index, mask, scale=0.2)


INT8_TOLERANCE = 0.06
"""Largest difference of attention with scores in 8 bits to fp64, for inputs of unit variance."""


def int8_specs(dtype: torch.dtype, head_dim: int = 64, value_dim: int = 64) -> list[KernelSpec]:
    """Kernels with scores in 8 bits that run here: values as their dtype is, and in fp16."""
    if int8_reason(dtype):
        return []
    spec = KernelSpec(dtype_name(dtype), head_dim, value_dim, "avx512", int8=True)
    found = [spec]
    if has("avx512_fp16"):
        found.append(dataclasses.replace(spec, halves=True))
    if dtype == torch.bfloat16 and "avx512_bf16" in instruction_sets():
        found.append(dataclasses.replace(spec, instruction_set="avx512_bf16"))
    return found


def run_int8_case(case: dict[str, object]) -> None:
    """Compare one drawn case in 8 bits; also what the AddressSanitizer run calls."""
    generator = torch.Generator().manual_seed(case["seed"])
    inputs, index, mask = make_case(case, generator, case["dtype"], 40, 24)
    wide = [tensor.double() for tensor in inputs]
    expected = reference.sparse_attention(AttentionInputs(*wide, mask, 0.2), index)
    for spec in int8_specs(case["dtype"], 40, 24)[-1:]:
        found = run_attention(spec, AttentionInputs(*inputs, mask, 0.2), index).double()
        size = max(1.0, expected.abs().max().item())
        assert (found - expected).abs().max() <= INT8_TOLERANCE * size


def assert_same_index(found: SparseIndex, expected: SparseIndex) -> None:
    assert found.head_slots == expected.head_slots
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
