"""Generated sparse attention, interpreted, against the reference op in fp64."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass import backend
from mpass.lowering import dispatch, ops
from mpass.lowering.index import AttentionMask, IndexWidth
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference import attention as reference
from mpass.lowering.triton.attention import attention_spec, key_limits, sparse_attention
from mpass.patterns.strided import Strided
from mpass.patterns.tri_shape import TriShape
from tests.helpers.huge_scores import ROWS, clear_rows, huge_inputs
from tests.helpers.pairwise import pairwise
from tests.helpers.rotation import part_of_today
from tests.helpers.triton_cases import SLOTS, padding, poisoned_memory, random_index
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention

BLOCKS_ONLY = IndexWidth(max_blocks=3, max_diagonals=3)
WITH_COLUMNS = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=70)

FLAGS = {
    "plain": {},
    "window": {"window": 70},
    "narrow window": {"window": 9},
    "padding": {"padding": True},
    "offset": {"offset": 37},
    "offset in blocks": {"offset": 128},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "bidirectional": {"causal": False},
    "bidirectional padding": {"causal": False, "padding": True},
    "window both ways": {"causal": False, "window": 70},
    "narrow window both ways": {"causal": False, "window": 9, "padding": True},
    "all": {"window": 90, "padding": True, "offset": 37, "softcap": 3.0, "sinks": True},
}


def check(
    slots: tuple[int, ...] = SLOTS["lists"],
    width: IndexWidth = BLOCKS_ONLY,
    *,
    batch: int = 1,
    num_queries: int = 150,
    num_keys: int | None = None,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    padding_keys: bool = False,
    offset: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: bool = False,
    scale: float = 0.2,
    transposed: bool = False,
    seed: int = 0,
) -> torch.Tensor:
    """Compare with the reference in fp64 and return the kernel's output."""
    heads = len(slots)
    num_keys = num_keys or num_queries + offset
    query, key, value = random_attention(
        batch, heads, heads // 2, num_queries, num_keys, head_dim, value_dim, dtype, seed
    )
    if transposed:
        query, key, value = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
        )
    key_mask = padding(batch, num_keys) if padding_keys else None
    mask = AttentionMask(causal, offset, window, key_mask)
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    index = random_index(slots, mask, width=width, seed=seed, **sizes)
    logits = torch.linspace(-1, 2, heads) if sinks else None
    with poisoned_memory():
        out = sparse_attention(
            AttentionInputs(query, key, value, mask, scale, softcap=softcap, sink_logits=logits),
            index,
        )
    wide = (query.double(), key.double(), value.double())
    truth = reference.sparse_attention(
        AttentionInputs(*wide, mask, scale, softcap=softcap, sink_logits=logits), index
    )
    assert out.dtype == dtype and out.shape == truth.shape
    assert out.transpose(1, 2).is_contiguous()
    assert (out.double() - truth).abs().max() < TOLERANCE[dtype]
    return out


WIDTHS = {"blocks": BLOCKS_ONLY, "columns": WITH_COLUMNS}


@pytest.mark.parametrize(
    ("flags", "form", "columns"),
    part_of_today(pairwise(FLAGS, ["lists", "diagonals", "mixed"], WIDTHS), share=2),
)
def test_attention_equals_reference_for_every_form_and_flag(flags, form, columns):
    flags, width = dict(FLAGS[flags]), WIDTHS[columns]
    padded = flags.pop("padding", False)
    check(SLOTS[form], width, batch=2 if padded else 1, padding_keys=padded, **flags)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", ["plain", "window", "softcap"])
def test_attention_in_half_precision_equals_reference(dtype, flags):
    check(SLOTS["mixed"], WITH_COLUMNS, dtype=dtype, **FLAGS[flags])


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    part_of_today(
        [
            (16, 16),
            (20, 36),
            (64, 64),
            (80, 80),
            (96, 96),
            (112, 48),
            (192, 128),
            (64, 240),
            (256, 256),
        ],
        share=3,
    ),
)
def test_head_sizes_that_are_no_power_of_two_are_cut_into_parts(head_dim, value_dim):
    check(
        SLOTS["diagonals"],
        WITH_COLUMNS,
        num_queries=100,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=head_dim**-0.5,
    )


@pytest.mark.parametrize("width", [BLOCKS_ONLY, WITH_COLUMNS], ids=["blocks", "columns"])
def test_heads_that_share_a_row_of_the_index_are_packed_into_one_program(width):
    query, key, value = random_attention(num_queries=150)
    mask = AttentionMask()
    sizes = {"batch": 1, "num_queries": 150, "num_keys": 150}
    shared = random_index(SLOTS["shared"], mask, width=width, **sizes)
    assert attention_spec(AttentionInputs(query, key, value, mask, 0.2), shared).pack == 2
    check(SLOTS["shared"], width)
    check(SLOTS["shared"], width, window=50, offset=37, sinks=True, softcap=2.0)


@pytest.mark.parametrize(
    ("pattern", "form"),
    [
        (mpass.AShape(20, 70), "diagonals"),
        (Strided(20, 70, 128, 256), "diagonals"),
        (TriShape(20, 70, 30), "lists"),
    ],
    ids=str,
)
def test_heads_of_a_static_pattern_are_packed_in_compiled_programs(pattern, form, monkeypatch):
    monkeypatch.setattr(ops, "choose_lowering", lambda *_, **__: dispatch.find_lowering("triton"))
    monkeypatch.setattr(backend, "start_kernels", lambda plans: [])
    seen = []

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    query, key, value = random_attention(num_queries=300)
    options = {"pattern": pattern, "min_seq_len": 0, "dense_above": 1.0, "inner_backend": "eager"}
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="minference", options=options)
    with record(lambda call, operands: seen.append(operands)), torch.no_grad():
        out = compiled(query, key, value)
    (operands,) = seen
    index, mask = operands.index, operands.mask
    assert len(set(index.head_slots)) == 1
    spec = attention_spec(AttentionInputs(query, key, value, mask, 0.2), index)
    assert (spec.pack, spec.columns, spec.form) == (2, True, form)
    cells = mpass.computed_mask(query, key, pattern=pattern)
    truth = dense_attention(query, key, value, cells, operands.scale)
    assert (out - truth).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "offset"),
    [(1, 200, 199), (1, 1, 0), (64, 64, 0), (128, 100, 0), (70, 300, 130), (65, 65, 0)],
)
def test_query_and_key_lengths_need_not_match(num_queries, num_keys, offset):
    check(
        SLOTS["mixed"],
        WITH_COLUMNS,
        num_queries=num_queries,
        num_keys=num_keys,
        offset=offset,
    )


def test_inputs_may_be_laid_out_by_position():
    check(SLOTS["mixed"], WITH_COLUMNS, transposed=True)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-12])
def test_scales_that_are_not_positive_are_right_too(scale):
    check(SLOTS["lists"], BLOCKS_ONLY, scale=scale)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes_and_flags_equal_reference(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    offset = draw(0, 150)
    check(
        SLOTS["mixed" if seed % 2 else "shared"],
        IndexWidth(draw(1, 4), draw(1, 5), draw(0, 100)),
        batch=2,
        num_queries=draw(1, 180),
        num_keys=offset + draw(1, 220),
        offset=offset,
        head_dim=draw(16, 40),
        value_dim=draw(16, 40),
        window=draw(0, 2) * draw(1, 200),
        padding_keys=bool(draw(0, 2)),
        softcap=float(draw(0, 2) * 4),
        sinks=bool(draw(0, 2)),
        seed=seed,
    )


def test_rows_that_see_nothing_are_zero():
    query, key, value = random_attention(num_queries=130)
    hidden = torch.zeros(1, 130, dtype=torch.bool)
    mask = AttentionMask(key_mask=hidden)
    sizes = {"batch": 1, "num_queries": 130, "num_keys": 130}
    index = random_index(SLOTS["mixed"], mask, width=WITH_COLUMNS, **sizes)
    with poisoned_memory():
        out = sparse_attention(AttentionInputs(query, key, value, mask, 0.2), index)
    assert torch.count_nonzero(out) == 0


def test_sinks_of_minus_infinity_are_no_sinks():
    query, key, value = random_attention(num_queries=130)
    hidden = padding(1, 130)
    mask = AttentionMask(key_mask=hidden)
    sizes = {"batch": 1, "num_queries": 130, "num_keys": 130}
    index = random_index(SLOTS["mixed"], mask, width=WITH_COLUMNS, **sizes)
    sinks = torch.full((4,), -torch.inf)
    without = sparse_attention(AttentionInputs(query, key, value, mask, 0.2), index)
    out = sparse_attention(AttentionInputs(query, key, value, mask, 0.2, sink_logits=sinks), index)
    assert (out - without).abs().max() < TOLERANCE[torch.float32]


def test_no_queries_and_no_keys_launch_nothing():
    query, key, value = random_attention(num_queries=0, num_keys=70)
    mask = AttentionMask()
    index = random_index(
        SLOTS["lists"], mask, batch=1, num_queries=0, num_keys=70, width=BLOCKS_ONLY
    )
    assert sparse_attention(AttentionInputs(query, key, value, mask, 1.0), index).shape == (
        1,
        4,
        0,
        32,
    )
    query, key, value = random_attention(num_queries=70, num_keys=0)
    index = random_index(
        SLOTS["lists"], mask, batch=1, num_queries=70, num_keys=0, width=BLOCKS_ONLY
    )
    with poisoned_memory():
        out = sparse_attention(AttentionInputs(query, key, value, mask, 1.0), index)
    assert torch.count_nonzero(out) == 0


def test_padding_leaves_whole_blocks_unless_it_has_holes():
    mask = torch.ones(3, 300, dtype=torch.bool)
    mask[0, :70] = False
    mask[1, 100] = False
    mask[2] = False
    assert key_limits(mask).tolist() == [[1, 4, 2, 3], [0, 4, 0, -1], [5, -1, 5, -1]]


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1e8, 1e30])
def test_huge_scores_give_the_value_of_the_greatest(size, rows, sinks):
    query, key, value = huge_inputs(torch.float32, size, rows, num_keys=150)
    mask = AttentionMask(window=90)
    sizes = {"batch": 1, "num_queries": 150, "num_keys": 150}
    index = random_index((0, -1), mask, width=WITH_COLUMNS, **sizes)
    logits = torch.tensor([0.5, 3e9]) if sinks else None
    numbers = {"scale": 0.3, "sink_logits": logits}
    found = sparse_attention(AttentionInputs(query, key, value, mask, **numbers), index)
    wide = AttentionInputs(query.double(), key.double(), value.double(), mask, **numbers)
    clear = clear_rows(wide, reference.computed_mask(index, mask, **sizes))
    error = (found.double() - reference.sparse_attention(wide, index)).abs().amax(-1)
    assert found.isfinite().all() and clear.double().mean() > 0.25
    assert error[clear].max() <= TOLERANCE[torch.float32]
