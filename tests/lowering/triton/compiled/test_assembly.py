"""Machine code of the attention kernel: its loops start copies long before they wait for them.

Compiled without a GPU. `pytest -m slow tests/lowering/triton/compiled/test_assembly.py` reads every
kernel that has three stages.
"""

from __future__ import annotations

import pytest

from mpass.lowering.triton.assembly import Loop, parse, product_loops
from mpass.lowering.triton.compile import attention_report, compiled_loops, table_spec
from mpass.lowering.triton.spec import TritonKernelSpec
from tests.helpers.rotation import part_of_today

FLAGS = {
    "lists": {},
    "lists_columns": {"columns": True},
    "diagonals_columns": {"form": "diagonals", "columns": True},
    "mixed_columns": {"form": "mixed", "columns": True},
    "padding": {"form": "mixed", "columns": True, "padding": True},
    "capped": {"form": "mixed", "columns": True, "softcap": True},
}

LISTING = """
        /*0000*/                   LDG.E R4, desc[UR36][R40.64+0x1c] ;
.L_x_1:
        /*0010*/                   DEPBAR.LE SB0, 0x2 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/               @P1 LDGSTS.E.BYPASS.128 [R211], desc[UR36][R6.64], !P0 ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   FADD R1, R1, R2 ;
        /*00b0*/               @P0 BRA `(.L_x_3) ;
.L_x_2:
.L_x_4:
        /*00c0*/                   WARPGROUP.ARRIVE ;
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT, gsb0 ;
        /*00e0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00f0*/                   WARPGROUP.ARRIVE ;
        /*0100*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*0110*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0120*/                   DEPBAR.LE SB0, 0x0 ;
        /*0130*/               @P0 BRA `(.L_x_4) ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
"""


def check_loops(spec: TritonKernelSpec) -> list[Loop]:
    """Each loop over keys lets the copies of a later step run on while it waits for its own."""
    report = attention_report(spec)
    assert report.spill_bytes <= 16 and not report.serialized
    loops = compiled_loops(spec, "sparse_attention")
    assert len(loops) == (3 if spec.columns else 2)
    for loop in loops:
        assert loop.copies > 0
        assert loop.waits and min(loop.waits) >= 1
        assert min(loop.chains) >= 2
    return loops


def test_loops_are_read_from_a_listing():
    overlapped, serial = product_loops(parse(LISTING))
    assert (overlapped.products, overlapped.copies) == (2, 1)
    assert (overlapped.waits, overlapped.chains) == ((2,), (2,))
    assert (serial.waits, serial.chains) == ((0,), (1, 1))


def test_a_kernel_of_two_stages_waits_for_all_copies():
    """What the others are held against: the reader sees a loop with nothing in flight."""
    spec = table_spec("sm_90", 128, columns=True, window=True)
    assert spec.num_stages == 2
    assert any(0 in loop.waits for loop in compiled_loops(spec, "sparse_attention"))


@pytest.mark.parametrize(
    ("head_dim", "flags"),
    [(128, "lists"), *part_of_today([(d, "diagonals_columns") for d in (64, 128, 256)], share=3)],
)
def test_loops_wait_for_the_copies_before_the_last_ones_at_most(head_dim, flags):
    check_loops(table_spec("sm_90", head_dim, **FLAGS[flags]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_loops_of_every_kernel_of_three_stages_overlap(head_dim, dtype, flags):
    check_loops(table_spec("sm_90", head_dim, dtype=dtype, **FLAGS[flags]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["lists", "diagonals_columns"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_loops_of_packed_heads_overlap(head_dim, flags):
    check_loops(table_spec("sm_90", head_dim, pack=2, **FLAGS[flags]))
