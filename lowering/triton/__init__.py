"""Generated Triton kernels for GPUs: spec -> source -> module -> launch.

A `TritonKernelSpec` (spec.py) becomes source (source.py, templates/), a module (source.load) and a
launch (launch.py). Triton itself is imported by the first call, never by importing this package.
"""

from mpass.lowering.device import Lazy, Lowering
from mpass.lowering.estimators import (
    BLOCK_SCORES,
    BLOCK_SPARSE,
    FLEX_PREFILL,
    SAMPLE_ATTENTION,
    VERTICAL_BLOCK,
    VERTICAL_SLASH,
    X_ATTENTION,
)

HERE = __name__

LOWERING = Lowering(
    name="triton",
    device="cuda",
    serves=Lazy(f"{HERE}.support:unsupported"),
    sparse_attention=Lazy(f"{HERE}.attention:sparse_attention"),
    sparse_attention_lse=Lazy(f"{HERE}.attention:sparse_attention_lse"),
    attention_backward=Lazy(f"{HERE}.backward:attention_backward"),
    correct_as_listed=Lazy(f"{HERE}.listed:correct_as_listed"),
    estimators={
        BLOCK_SCORES: Lazy(f"{HERE}.block_scores:block_scores_index"),
        BLOCK_SPARSE: Lazy(f"{HERE}.block_sparse:block_sparse_index"),
        FLEX_PREFILL: Lazy(f"{HERE}.flex_prefill:flex_prefill_index"),
        SAMPLE_ATTENTION: Lazy(f"{HERE}.sample_attention:sample_attention_index"),
        VERTICAL_BLOCK: Lazy(f"{HERE}.union:vertical_block_index"),
        VERTICAL_SLASH: Lazy(f"{HERE}.vertical_slash:vertical_slash_index"),
        X_ATTENTION: Lazy(f"{HERE}.x_attention:x_attention_index"),
    },
    blind=frozenset({BLOCK_SCORES, BLOCK_SPARSE, FLEX_PREFILL, X_ATTENTION}),
    builds_ahead=True,
    prepare=Lazy(f"{HERE}.prepare:prepare"),
    least_lengths=Lazy(f"{HERE}.policy:least_lengths"),
    begin_call=Lazy(f"{HERE}.policy:begin_call"),
    decided=Lazy(f"{HERE}.policy:decided"),
    end_call=Lazy(f"{HERE}.policy:end_call"),
    default_pattern="union",
    language="python",
    made_for=Lazy(f"{HERE}.support:made_for"),
    synchronize=Lazy(f"{HERE}.support:synchronize"),
)

__all__ = ["LOWERING"]
