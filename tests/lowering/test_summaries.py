"""Keys that are left out count by the mean of their run: against fp64 over keys and means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mpass
from mpass.errors import OptionValueError
from mpass.lowering import cpu, triton
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference import attention as reference
from mpass.lowering.summaries import with_summaries
from tests.helpers.requirements import needs_package
from tests.helpers.triton_cases import SLOTS, padding, random_index
from tests.helpers.truth import random_attention

needs_triton = needs_package("triton", "Triton is not installed")

SPARSE_LSE = {
    "reference": reference.sparse_attention_lse,
    "cpu": cpu.LOWERING.sparse_attention_lse,
    "triton": triton.LOWERING.sparse_attention_lse,
}


def truth(inputs: AttentionInputs, cells: torch.Tensor, whole: torch.Tensor, run: int):
    """fp64 attention over the cells, and over the means of each row's runs that have none.

    cells: what is computed exactly; whole: its key blocks, of which no mean is made; bool
    [B, H, Nq, Nk]. A mean leaves out padding and the head's columns.
    """
    query, num_keys = inputs.query.double(), inputs.key.shape[2]
    heads = query.shape[1]
    key = reference.repeat_kv(inputs.key.double(), heads)
    value = reference.repeat_kv(inputs.value.double(), heads)
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    real = inputs.mask.key_mask
    real = torch.ones(query.shape[0], num_keys, dtype=torch.bool) if real is None else real
    for b in range(query.shape[0]):
        for h in range(heads):
            columns = (cells & ~whole)[b, h].any(0)
            for row in range(query.shape[2]):
                seen = cells[b, h, row]
                keys, values = [key[b, h, seen]], [value[b, h, seen]]
                weights = [torch.ones(int(seen.sum()), dtype=torch.float64)]
                for start in range(0, num_keys, run):
                    part = torch.zeros(num_keys, dtype=torch.bool)
                    part[start : start + run] = True
                    if whole[b, h, row, start]:
                        continue
                    part &= real[b] & ~columns
                    if part.any():
                        keys.append(key[b, h, part].mean(0, keepdim=True))
                        values.append(value[b, h, part].mean(0, keepdim=True))
                        weights.append(part.sum().double()[None])
                scores = torch.cat(keys) @ query[b, h, row] * inputs.scale
                scores = scores + torch.cat(weights).log()
                if len(scores):
                    out[b, h, row] = torch.softmax(scores, 0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("run", [16, 64])
@pytest.mark.parametrize("columns", [0, 30], ids=["blocks", "columns"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "lowering", ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
)
def test_means_of_what_is_left_out_are_keys_of_that_weight(lowering, padded, columns, run):
    if lowering == "triton" and padded == bool(columns):
        pytest.skip("two of the four kinds are interpreted")
    batch, num_keys = (2, 150) if padded else (1, 150)
    query, key, value = random_attention(batch, 4, 2, 70, num_keys)
    mask = AttentionMask(causal=False, key_mask=padding(batch, num_keys) if padded else None)
    sizes = {"batch": batch, "num_queries": 70, "num_keys": num_keys}
    width = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=columns)
    index = random_index(SLOTS["lists"], mask, width=width, seed=3, **sizes)
    inputs = AttentionInputs(query, key, value, mask, 0.2)
    out = with_summaries(inputs, index, *SPARSE_LSE[lowering](inputs, index), run)
    cells = reference.computed_mask(index, mask, **sizes)
    row_blocks = torch.arange(70) // BLOCK
    blocks = reference.selected_blocks(index, row_blocks, row_blocks, 3, stop=2)
    whole = blocks.repeat_interleave(BLOCK, -1)[..., :num_keys]
    assert (out.double() - truth(inputs, cells, whole, run)).abs().max() < 1e-5


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def test_graph_of_an_encoder_has_means_and_a_causal_one_has_none():
    q, k, v = random_attention(1, 2, 2, 520, head_dim=16)
    q, k = q * 0.3, k + torch.linspace(0, 2, 520)[:, None]  # diffuse, as vision is
    options = {"inner_backend": "eager", "min_seq_len": 64, "dense_above": 2.0}
    options |= {"pattern": "block_sparse(2)"}
    errors = []
    for summaries in (0, 16):
        given = options | {"summaries": summaries}
        compiled = torch.compile(attention, backend="minference", options=given)
        with record() as log:
            out = compiled(q, k, v)
        assert log.calls[-1].lowering == "cpu"
        errors.append(float((out - attention(q, k, v)).norm()))
    assert errors[1] < errors[0] / 2

    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    plain = torch.compile(causal, backend="minference", options=options)(q, k, v)
    same = torch.compile(causal, backend="minference", options=options | {"summaries": 16})
    assert torch.equal(plain, same(q, k, v))


def test_runs_that_do_not_divide_a_block_are_refused():
    with pytest.raises(OptionValueError, match="summaries"):
        mpass.compile(torch.nn.Identity(), summaries=10)
