"""What a lowering is: the functions that run on one kind of device, and the policy of that device.

A lowering is one folder whose package exports one `LOWERING`; mpass.lowering.dispatch finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpass.lowering import block_mask
from mpass.lowering.block_mask import BlockLists
from mpass.lowering.crossover import EstimatedWork, LayerWork, LeastLengths, PatternWork
from mpass.lowering.estimators import EstimateFunction, Estimator
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs, RowLosses
from mpass.lowering.reference import attention, dense, linear
from mpass.lowering.reference.backward import ForwardResult, Gradients

SHORTEST_PROMPT = 2048
"""Keys from which attention becomes sparse where neither an option, a config nor a device says."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """A function that is imported when it is first called, so that a table of them costs nothing.

    place: its module and its name, as `module:name`.
    """

    place: str

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module, name = self.place.split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return found

    def __call__(self, *arguments: Any) -> Any:
        return self.load()(*arguments)


@dataclass(frozen=True, slots=True)
class Build:
    """Something that takes long to build, by a name for messages; `run` may be in any thread."""

    name: str
    run: Callable[[], None]


def keeps_nothing(*arguments: Any) -> str:
    """Of a lowering that remembers no calls: nothing speaks against sparse attention."""
    return ""


def no_linear(dtype: torch.dtype) -> str:
    """Of a lowering without linear layers of its own."""
    return "linear layers in 8 or 16 bits run on CPUs only"


def no_int8(dtype: torch.dtype) -> str:
    """Of a lowering whose scores are never products of 8-bit numbers."""
    return "scores in 8 bits run on CPUs only"


def no_wait(device: torch.device) -> None:
    """Nothing runs behind the caller's back on such a device."""


@dataclass(frozen=True, slots=True, eq=False)
class Lowering:
    """How sparse attention runs on one kind of device, and all that depends on the device.

    name: as in records and reports; device: the type of the tensors that it serves.
    serves: why it cannot serve an attention, in words, or None; reads dtypes, devices and static
    shapes only, so that fake tensors will do.
    sparse_attention, sparse_attention_lse, dense_attention: as their references in
    mpass.lowering.reference.
    row_losses: as in mpass.lowering.exact_rows.
    correct_as_listed: as in mpass.lowering.block_mask; asked for where costs do not decide.
    attention_backward: as in mpass.lowering.reference.backward; None where nothing is trained.
    estimators: its own implementations; the reference serves where there is none.
    blind: those of them that do not see a bias by distance; trains_bias: whether the backward pass
    gives the gradient of one.
    default_pattern: what a head gets that nothing configures: of the patterns with an own estimator
    here, the one that loses least (docs/patterns/union.md).
    shortest_prompt: keys from which attention is sparse where nothing configures it; least_lengths:
    the same for an attention that is known, and the queries from which it is; None for that number.
    decides_by_cost: whether reading an index costs so little that each call compares its work with
    dense attention's; where it does not, the host would have to wait for the device.
    begin_call, decided, end_call: what takes the place of that where the host must not wait: why
    dense attention runs by what earlier calls selected, asked by the ops that estimate and then by
    the attention, which tells at its end what was selected.
    fallback: whether plain torch takes what it does not serve; else that stays dense.
    builds_ahead: whether kernels take long to build, so that a thread starts before they are used:
    by using them on a block of zeros, unless there is a way to prepare.
    prepare: what is to be built for a layer, given a function that runs it on fake tensors; what
    the layer's calls look up is made by then. None where nothing can be foreseen so.
    breakeven_density: the share of the dense work up to which sparse attention is no slower.
    estimation_worthwhile: whether estimating an index and using it can be faster than dense.
    int8_reason: why scores of attention in a dtype are not products of 8-bit numbers where inputs
    allow it; "" if they are.
    linear_reason: why linear layers of a dtype do not run in 8 bits here; "" if they do;
    half_linear_reason: the same of half precision.
    quantize_rows, multiply_rows, linear_in_fp32, linear_in_half: as in
    mpass.lowering.reference.linear.
    fp32_linear_pays, half_linear_pays: whether linear layers of a dtype are faster with their
    numbers made fp32, and whether they are fastest in half precision.
    language: of its kernel sources; made_for: whether a kernel of a spec serves an attention of a
    dtype, a head_dim and a softcap or none.
    synchronize: waits until a device has done its work.
    """

    name: str
    device: str
    serves: Callable[[AttentionInputs], str | None]
    sparse_attention: Callable[[AttentionInputs, SparseIndex], Tensor]
    sparse_attention_lse: Callable[[AttentionInputs, SparseIndex], tuple[Tensor, Tensor]] = (
        attention.sparse_attention_lse
    )
    attention_backward: (
        Callable[[AttentionInputs, SparseIndex, ForwardResult], Gradients] | None
    ) = None
    row_losses: Callable[[AttentionInputs, SparseIndex, int, bool], RowLosses] = Lazy(
        "mpass.lowering.exact_rows:row_losses"
    )
    dense_attention: Callable[[AttentionInputs], Tensor] = dense.dense_attention
    correct_as_listed: Callable[[Tensor, AttentionInputs, BlockLists], None] = (
        block_mask.correct_as_listed
    )
    estimators: Mapping[Estimator, EstimateFunction] = field(default_factory=dict)
    blind: frozenset[Estimator] = frozenset()
    trains_bias: bool = False
    default_pattern: str = "union"
    shortest_prompt: int = SHORTEST_PROMPT
    least_lengths: Callable[[LayerWork, torch.device], LeastLengths] | None = None
    decides_by_cost: bool = False
    begin_call: Callable[[AttentionInputs, str, tuple[PatternWork, ...], int, float], str] = (
        keeps_nothing
    )
    decided: Callable[[AttentionInputs, int], str] = keeps_nothing
    end_call: Callable[[AttentionInputs, SparseIndex, int], object] = keeps_nothing
    fallback: bool = False
    builds_ahead: bool = False
    prepare: Callable[[Callable[[], object]], Sequence[Build]] | None = None
    breakeven_density: Callable[[AttentionInputs], float] = dense.breakeven_density
    estimation_worthwhile: Callable[[EstimatedWork], bool] = dense.estimation_worthwhile
    int8_reason: Callable[[torch.dtype], str] = no_int8
    linear_reason: Callable[[torch.dtype], str] = no_linear
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]] = linear.quantize_rows
    multiply_rows: Callable[[Tensor, Tensor], Tensor] = linear.multiply_rows
    fp32_linear_pays: Callable[[torch.dtype], bool] = lambda dtype: False
    half_linear_pays: Callable[[torch.dtype], bool] = lambda dtype: False
    linear_in_fp32: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear.linear_in_fp32
    half_linear_reason: Callable[[torch.dtype], str] = no_linear
    linear_in_half: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear.linear_in_half
    language: str = ""
    made_for: Callable[[Any, torch.dtype, int, bool], bool] = lambda *_: False
    synchronize: Callable[[torch.device], None] = no_wait

    def estimate(self, estimator: Estimator) -> EstimateFunction:
        """Its implementation of an estimator, plain torch's where it has none."""
        return self.estimators.get(estimator, estimator.reference)


REFERENCE = Lowering(
    name="reference",
    device="",
    serves=lambda inputs: None,
    sparse_attention=attention.sparse_attention,
    fallback=True,
)
"""Plain torch: what all others mean, and what runs where none of them serves."""
