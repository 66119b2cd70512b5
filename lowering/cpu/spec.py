"""KernelSpec: what a generated C++ library is specialised on, and its source.

Specialised on what the inner loops see: dtype, head_dim, value dim, strip width, softcap and the
instruction set. Not on anything that changes from call to call or that is decided once per 64 x 64
tile: lengths, heads, batch, strides, density, index form, columns, windows, padding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jinja2

from mpass.lowering.cpu.arguments import AttentionArguments, EstimateArguments, c_fields
from mpass.lowering.cpu.list_arguments import LIST_KERNELS, list_c_fields
from mpass.lowering.index import ALL_BLOCKS, BLOCK
from mpass.lowering.reference import vertical_slash as estimate

STRIP = 4
"""Tiles of 64 keys per softmax update: the scores of a strip (64 KiB) stay in the second cache."""

MAX_HEAD_DIM = 512
"""Largest head_dim and value dim that the tiles and their buffers are laid out for."""

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2")
"""From the fastest to the one that every x86-64 machine of the last ten years has."""

INPUT_TYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Exp2:
    """Polynomial for 2^r on [-1/2, 1/2], minimax in relative error (Remez).

    coefficients: of r^0, r^1, ...; note: the error, for the generated source.
    """

    coefficients: tuple[float, ...]
    note: str


EXP2_BF16 = Exp2(
    (0.999928074, 0.693260985, 0.242611122, 0.0551716691),
    "degree 3, relative error 7.5e-5 (bf16 rounds at 2e-3)",
)
EXP2_FP32 = Exp2(
    (1.00000007, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.0013276472),
    "degree 5, relative error 7.5e-8",
)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One library of generated kernels.

    kernel: "attention"; for estimators (value_dim is then head_dim) "estimate" or one of
    LIST_KERNELS;
    input: dtype of q, k, v and out, without `torch.`.
    """

    input: str
    head_dim: int
    value_dim: int
    instruction_set: str
    softcap: bool = False
    strip: int = STRIP
    kernel: str = "attention"

    def __str__(self) -> str:
        cap = ", softcap" if self.softcap else ""
        shape = f"{self.kernel}, {self.input}, D={self.head_dim}"
        if self.kernel == "attention":
            shape += f", DV={self.value_dim}, strips of {self.strip} tiles{cap}"
        return f"{shape}, {self.instruction_set}"

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
            self.input == "bfloat16" or self.kernel != "attention"
        )

    @property
    def in_bytes(self) -> bool:
        """Whether `union` multiplies means of keys in 8 bits: they only choose blocks.

        Every processor with products of bf16 has products of 8-bit numbers at twice their rate.
        """
        return self.kernel == "union" and self.bf16

    @property
    def byte_depth(self) -> int:
        """Words of four 8-bit numbers per row: whole tile rows for AMX."""
        words = -(-self.head_dim // 4)
        return round_up(words, 16) if self.amx else words

    @property
    def packed(self) -> str:
        return "bfloat16" if self.bf16 else "float32"

    @property
    def lanes(self) -> int:
        """Floats per vector register."""
        return 8 if self.instruction_set == "avx2" else 16

    @property
    def tile_rows(self) -> int:
        """Rows of the register tile: 8 x 3 or 6 x 4 of 32 registers, 6 x 2 of AVX2's 16.

        8 divides a block's rows, which is worth 2%; products of bf16 pairs gain nothing by it.
        """
        return 8 if self.tile_vectors == 3 else 6

    @property
    def tile_vectors(self) -> int:
        """Vectors per row of the register tile."""
        if self.lanes == 8:
            return 2
        return 4 if self.bf16 else 3

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


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this folder."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mpass.lowering.cpu", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def generate_source(spec: KernelSpec) -> str:
    """The C++ translation unit of a spec; its text keys the cache of compiled libraries."""
    if spec.kernel in LIST_KERNELS:
        arguments = list_c_fields(spec.kernel)
    else:
        arguments = c_fields(
            AttentionArguments if spec.kernel == "attention" else EstimateArguments
        )
    return (
        environment()
        .get_template("kernel.cpp.jinja")
        .render(
            spec=spec,
            block=BLOCK,
            all_blocks=ALL_BLOCKS,
            exp2=EXP2_BF16 if spec.bf16 else EXP2_FP32,
            arguments=arguments,
            constants=estimate,
        )
    )
