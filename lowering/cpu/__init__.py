"""Generated C++ for x86-64 CPUs: KernelSpec -> source -> compiled library -> call.

Nothing is compiled, and no compiler is looked for, before the first call.
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
    name="cpu",
    device="cpu",
    serves=Lazy(f"{HERE}.support:unsupported"),
    sparse_attention=Lazy(f"{HERE}.attention:sparse_attention"),
    sparse_attention_lse=Lazy(f"{HERE}.attention:sparse_attention_lse"),
    attention_backward=Lazy(f"{HERE}.backward:attention_backward"),
    row_losses=Lazy(f"{HERE}.row_losses:row_losses"),
    dense_attention=Lazy(f"{HERE}.dense:dense_attention"),
    breakeven_density=Lazy(f"{HERE}.dense:breakeven_density"),
    estimation_worthwhile=Lazy(f"{HERE}.dense:estimation_worthwhile"),
    estimators={
        BLOCK_SCORES: Lazy(f"{HERE}.estimators:block_scores_index"),
        BLOCK_SPARSE: Lazy(f"{HERE}.estimators:block_sparse_index"),
        FLEX_PREFILL: Lazy(f"{HERE}.estimators:flex_prefill_index"),
        SAMPLE_ATTENTION: Lazy(f"{HERE}.estimators:sample_attention_index"),
        VERTICAL_BLOCK: Lazy(f"{HERE}.estimators:vertical_block_index"),
        VERTICAL_SLASH: Lazy(f"{HERE}.estimators:vertical_slash_index"),
        X_ATTENTION: Lazy(f"{HERE}.estimators:x_attention_index"),
    },
    trains_bias=True,
    int8_reason=Lazy(f"{HERE}.support:int8_reason"),
    linear_reason=Lazy(f"{HERE}.linear:linear_reason"),
    quantize_rows=Lazy(f"{HERE}.linear:quantize_rows"),
    multiply_rows=Lazy(f"{HERE}.linear:multiply_rows"),
    fp32_linear_pays=Lazy(f"{HERE}.linear_rates:fp32_linear_pays"),
    linear_in_fp32=Lazy(f"{HERE}.linear:linear_in_fp32"),
    half_linear_pays=Lazy(f"{HERE}.linear_rates:half_linear_pays"),
    half_linear_reason=Lazy(f"{HERE}.linear_half:half_linear_reason"),
    linear_in_half=Lazy(f"{HERE}.linear_half:linear_in_half"),
    default_pattern="union",
    decides_by_cost=True,
    fallback=True,
    builds_ahead=True,
    language="cpp",
    made_for=Lazy(f"{HERE}.support:made_for"),
)

__all__ = ["LOWERING"]
