"""Log-sum-exps of sparse attention, by plain torch, generated C++ and interpreted Triton."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.lowering.cpu import attention as cpu
from mpass.lowering.index import AttentionMask, IndexWidth
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.triton import attention as triton
from tests.helpers.cpu_cases import REASON
from tests.helpers.pairwise import pairwise
from tests.helpers.rotation import part_of_today
from tests.helpers.triton_cases import SLOTS, padding, poisoned_memory, random_index
from tests.helpers.truth import TOLERANCE, random_attention

LOWERINGS = {
    "reference": reference.sparse_attention_lse,
    "cpu": cpu.sparse_attention_lse,
    "triton": triton.sparse_attention_lse,
}

MASKS = {
    "plain": {},
    "window": {"window": 70},
    "padding": {"padding": True},
    "offset": {"offset": 37},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "negative scale": {"scale": -0.1},
    "zero scale": {"scale": 0.0},
    "bidirectional padding": {"causal": False, "padding": True},
    "all": {"window": 90, "padding": True, "offset": 37, "softcap": 3.0, "sinks": True},
}

CASES = pairwise(MASKS, SLOTS, (torch.float32, torch.bfloat16), (0, 70))
CASES = [(*case, name) for name in LOWERINGS for case in part_of_today(CASES, share=2)]


def true_lse(inputs: AttentionInputs, cells: torch.Tensor) -> torch.Tensor:
    """fp64 log-sum-exps over cells [B, H, Nq, Nk]."""
    group = inputs.query.shape[1] // inputs.key.shape[1]
    keys = inputs.key.double().repeat_interleave(group, 1)
    scores = inputs.query.double() @ keys.mT * inputs.scale
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    scores = scores.masked_fill(~cells, -torch.inf)
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    return torch.logsumexp(scores, -1)


@pytest.mark.parametrize(("mask", "form", "dtype", "columns", "lowering"), CASES, ids=str)
def test_log_sum_exps_equal_fp64_over_the_computed_mask(mask, form, dtype, columns, lowering):
    if lowering == "cpu" and REASON:
        pytest.skip(REASON)
    flags = MASKS[mask]
    offset, causal = flags.get("offset", 0), flags.get("causal", True)
    slots = SLOTS[form] if causal else SLOTS["lists"]
    sizes = {"batch": 2, "num_queries": 140, "num_keys": 140 + offset}
    query, key, value = random_attention(2, 4, 2, 140, 140 + offset, 64, dtype=dtype)
    key_mask = padding(2, 140 + offset) if "padding" in flags else None
    visible = AttentionMask(causal, offset, flags.get("window", 0), key_mask)
    width = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=columns)
    index = random_index(slots, visible, width=width, **sizes)
    logits = torch.linspace(-1, 2, 4) if "sinks" in flags else None
    inputs = AttentionInputs(
        query, key, value, visible, flags.get("scale", 0.1), flags.get("softcap", 0.0), logits
    )
    cells = reference.computed_mask(index, visible, **sizes)
    expected = true_lse(inputs, cells)
    with poisoned_memory():
        out, lse = LOWERINGS[lowering](inputs, index)
    assert lse.dtype == torch.float32
    assert lse.shape == query.shape[:3]
    hidden = torch.isinf(expected)
    if mask == "padding":
        assert hidden.any()
    assert torch.equal(hidden, lse == -torch.inf)
    error = (lse.double() - expected)[~hidden].abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-3)
    alone = reference.sparse_attention(inputs, index)
    assert (out - alone).abs().max() <= TOLERANCE[dtype] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern", [mpass.VerticalSlash(4, 8), mpass.BlockSparse(1), mpass.AShape(8, 64)], ids=str
)
def test_attend_returns_log_sum_exps_of_what_it_computes(pattern, dtype):
    query, key, value = random_attention(1, 4, 2, 300, head_dim=64, dtype=dtype)
    options = {"patterns": pattern, "scale": 0.2, "window": 200, "softcap": 2.0}
    options["sinks"] = torch.linspace(-1, 2, 4)
    out, lse = mpass.attend(query, key, value, **options, dense_above=1.0, return_lse=True)
    plain = mpass.attend(query, key, value, **options, dense_above=1.0)
    cells = mpass.computed_mask(query, key, pattern=pattern, scale=0.2, window=200)
    mask = AttentionMask(window=200)
    inputs = AttentionInputs(query, key, value, mask, 0.2, 2.0, options["sinks"])
    assert (lse.double() - true_lse(inputs, cells)).abs().max() <= 1e-3
    assert torch.equal(out, plain)


@pytest.mark.parametrize("pattern", ["dense", "block_sparse(9)"])
@pytest.mark.parametrize("num_queries", [1, 150])
def test_log_sum_exps_join_attention_over_two_parts_of_the_keys(pattern, num_queries):
    """Dense attention and attention over an index both return what joining needs."""
    query, key, value = random_attention(1, 4, 2, num_queries, 300)
    first = torch.arange(300) < 100
    parts = []
    for chosen in (first, ~first):
        parts.append(
            mpass.attend(
                *(query, key, value),
                patterns=pattern,
                query_offset=300 - num_queries,
                key_mask=chosen[None],
                dense_above=2.0,
                return_lse=True,
            )
        )
    whole, total = mpass.attend(
        *(query, key, value),
        patterns=pattern,
        query_offset=300 - num_queries,
        dense_above=2.0,
        return_lse=True,
    )
    (left, left_lse), (right, right_lse) = parts
    joined = torch.logaddexp(left_lse, right_lse)
    weights = [(lse - joined).exp()[..., None] for lse in (left_lse, right_lse)]
    assert torch.allclose(joined, total, atol=1e-5)
    assert torch.allclose(left * weights[0] + right * weights[1], whole, atol=1e-5)


def test_dense_attention_instead_of_sparse_returns_its_own_log_sum_exps():
    query, key, value = random_attention(1, 2, 1, 260)
    _, lse = mpass.attend(
        query, key, value, patterns="a_shape(8, 64)", dense_above=0.0, return_lse=True
    )
    cells = torch.ones(260, 260, dtype=torch.bool).tril()
    inputs = AttentionInputs(query, key, value, AttentionMask(), 32**-0.5)
    assert (lse.double() - true_lse(inputs, cells)).abs().max() <= 1e-5


def test_sparse_attention_returns_log_sum_exps_without_causality():
    query, key, value = random_attention(1, 2, 2, 200)
    options = {"pattern": "block_sparse(9)", "is_causal": False}
    _, lse = mpass.sparse_attention(query, key, value, **options, return_lse=True)
    inputs = AttentionInputs(query, key, value, AttentionMask(causal=False), 32**-0.5)
    cells = torch.ones(200, 200, dtype=torch.bool)
    assert (lse.double() - true_lse(inputs, cells)).abs().max() <= 1e-5


def test_ops_with_log_sum_exps_pass_opcheck():
    query, key, value = random_attention(num_queries=130, value_dim=16)
    mask = AttentionMask()
    width = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=8)
    index = random_index(SLOTS["mixed"], mask, width=width, batch=1, num_queries=130, num_keys=130)
    rest = (list(index.head_slots), None, None, 0, 0, True, 0.2, 0.0, 1.0, 0, 3)
    op = torch.ops.minference.sparse_attention_lse.default
    torch.library.opcheck(op, (query, key, value, *index.tensors(), *rest))
    op = torch.ops.minference.attention_lse.default
    torch.library.opcheck(op, (query, key, value, None, None, 0, 0, True, 0.2, 0.0))


def test_log_sum_exps_are_traced_into_one_graph():
    query, key, value = random_attention(1, 2, 1, 200)

    def joined(query, key, value):
        out, lse = mpass.attend(
            query, key, value, patterns="a_shape(8, 64)", dense_above=2.0, return_lse=True
        )
        return out * lse.exp()[..., None]

    compiled = torch.compile(joined, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(query, key, value), joined(query, key, value), rtol=1e-5)
