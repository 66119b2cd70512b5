"""KernelSpec: what a generated C++ library is specialised on.

Specialised on what the inner loops see: dtype, head_dim, value dim, strip width, softcap and the
instruction set. Not on anything that changes from call to call or that is decided once per 64 x 64
tile: lengths, heads, batch, strides, density, index form, vertical columns, windows, padding.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIP = 4
"""Tiles of 64 keys per softmax update: the scores of a strip (64 KiB) stay in the second cache."""

MAX_HEAD_DIM = 512
"""Largest head_dim and value dim that the tiles and their buffers are laid out for."""

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2")
"""From the fastest to the one that every x86-64 machine of the last ten years has."""

INPUT_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One library of generated kernels.

    kernel: "attention", "attention_backward" or "row_losses"; for estimators (value_dim is then
    head_dim) "fixed_budget" or one of LIST_KERNELS; "quantize_rows" and "linear_half" for linear
    layers.
    kernels/<kernel>.h is its source.
    input: dtype of q, k, v and out, without `torch.`.
    int8: whether the scores of attention are products of 8-bit numbers.
    halves: whether it then multiplies weights with values in fp16.
    biased: whether scores, or what an estimator takes for them, have a bias by distance added.
    """

    input: str
    head_dim: int
    value_dim: int
    instruction_set: str
    softcap: bool = False
    strip: int = STRIP
    kernel: str = "attention"
    int8: bool = False
    halves: bool = False
    biased: bool = False

    def __str__(self) -> str:
        cap = ", softcap" if self.softcap else ""
        shape = f"{self.kernel}, {self.input}, D={self.head_dim}"
        if self.attends:
            shape += f", DV={self.value_dim}, strips of {self.strip} tiles{cap}"
            shape += ", scores in 8 bits" if self.int8 else ""
            shape += ", values in fp16" if self.halves else ""
        shape += ", biased by distance" if self.biased else ""
        return f"{shape}, {self.instruction_set}"

    @property
    def attends(self) -> bool:
        """Whether it computes attention, its gradients or its losses, and no index."""
        return self.kernel in ("attention", "attention_backward", "row_losses")

    @property
    def amx(self) -> bool:
        return self.instruction_set == "amx"

    @property
    def bf16(self) -> bool:
        """Whether products are taken in bf16: else everything is packed as fp32.

        Estimators take them in bf16 whatever the input: what they choose needs no more, and where
        the machine has such products they are at least twice as fast. Queries, keys and means of
        keys are rounded once, to nearest, when they are packed; sums are fp32.
        """
        return self.instruction_set in ("amx", "avx512_bf16") and (
            self.input == "bfloat16" or not self.attends
        )

    @property
    def uses_int8(self) -> bool:
        """Whether `union` multiplies pooled keys in 8 bits: they only choose blocks.

        Every processor with products of bf16 has products of 8-bit numbers at twice their rate.
        """
        return self.kernel == "union" and self.bf16

    @property
    def int8_depth(self) -> int:
        """Words of four 8-bit numbers per row: whole tile rows for AMX."""
        words = -(-self.head_dim // 4)
        return round_up(words, 16) if self.amx else words

    @property
    def sums_distances(self) -> bool:
        """Whether the attention of query rows is summed by distance as well as by key."""
        return self.kernel == "flex_prefill"

    @property
    def kernel_header(self) -> str:
        """The header in kernels/ that holds the entry points."""
        return f"{self.kernel}.h"

    @property
    def headers(self) -> dict[str, str]:
        """Which header in kernels/ stands for each `#include NAME_HEADER`."""
        wide = "vector_avx512_bf16.h" if self.bf16 else "vector_avx512.h"
        return {
            "VECTOR_HEADER": wide if self.lanes == 16 else "vector_avx2.h",
            "GEMM_HEADER": "gemm_amx.h" if self.amx else "gemm_vector.h",
            "GEMM_INT8_HEADER": "gemm_int8_amx.h" if self.amx else "gemm_int8_vnni.h",
            "POOLED_KEYS_HEADER": (
                "pooled_keys_int8.h" if self.uses_int8 else "pooled_keys_packed.h"
            ),
            "SCORES_HEADER": self.scores_header,
            "WEIGHTS_HEADER": "weights_fp16.h" if self.halves else "weights_packed.h",
        }

    @property
    def scores_header(self) -> str:
        """The header that takes the scores of a strip; in 8 bits none has a bias."""
        if self.biased:
            return "scores_biased.h"
        return "scores_int8.h" if self.int8 else "scores_packed.h"

    @property
    def packed(self) -> str:
        return "bfloat16" if self.bf16 else "float32"

    @property
    def weight(self) -> str:
        """The dtype of the weights of a softmax as they are multiplied with values."""
        return "float16" if self.halves else self.packed

    @property
    def extensions(self) -> tuple[str, ...]:
        """Instructions that it needs beyond those of its set, as compilers call them."""
        vnni = ("avx512vnni",) if self.int8 and not self.bf16 else ()
        return (*vnni, "avx512fp16") if self.halves else vnni

    @property
    def lanes(self) -> int:
        """Floats per vector register."""
        return 8 if self.instruction_set == "avx2" else 16

    @property
    def depth(self) -> int:
        """Words per packed row of queries and keys: pairs of bf16, whole tile rows for AMX."""
        words = -(-self.head_dim // 2) if self.bf16 else self.head_dim
        return round_up(words, 16) if self.bf16 and self.amx else words

    @property
    def value_width(self) -> int:
        """Floats per accumulated output row: whole vectors, whole tile pairs for AMX."""
        return round_up(self.value_dim, 32 if self.bf16 and self.amx else self.lanes)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
