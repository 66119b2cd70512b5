"""Generated C++ for x86-64 CPUs: KernelSpec -> source -> compiled library -> call.

Nothing is compiled, and no compiler is looked for, before the first call.
"""

from mpass.lowering import estimators
from mpass.lowering.device import Lazy, Lowering

HERE = __name__

LOWERING = Lowering(
    name="cpu",
    device="cpu",
    serves=Lazy(f"{HERE}.support:unsupported"),
    sparse_attention=Lazy(f"{HERE}.attention:sparse_attention"),
    dense_attention=Lazy(f"{HERE}.dense:dense_attention"),
    breakeven_density=Lazy(f"{HERE}.dense:breakeven_density"),
    estimation_worthwhile=Lazy(f"{HERE}.dense:estimation_worthwhile"),
    estimators={
        estimators.BLOCK_SCORES: Lazy(f"{HERE}.estimators:block_scores_index"),
        estimators.BLOCK_SPARSE: Lazy(f"{HERE}.estimators:block_sparse_index"),
        estimators.FLEX_PREFILL: Lazy(f"{HERE}.estimators:flex_prefill_index"),
        estimators.SAMPLE_ATTENTION: Lazy(f"{HERE}.estimators:sample_attention_index"),
        estimators.VERTICAL_BLOCK: Lazy(f"{HERE}.estimators:vertical_block_index"),
        estimators.VERTICAL_SLASH: Lazy(f"{HERE}.estimators:vertical_slash_index"),
        estimators.X_ATTENTION: Lazy(f"{HERE}.estimators:x_attention_index"),
    },
    default_pattern="union",
    decides_by_cost=True,
    fallback=True,
    builds_ahead=True,
    language="cpp",
    made_for=Lazy(f"{HERE}.support:made_for"),
)

__all__ = ["LOWERING"]
