"""What rounding queries and keys to 8 bits does to the scores of a model, simulated in fp32.

    python -m benchmarks.int8_scores --length 2048 --text code

Ways to round are combined: a step per row or per block of 64, with the mean key of a head
subtracted or not, with channels rotated or not. Every fourth layer and some of its query rows are
looked at, with all keys kept. Printed is how far scores are off (root of the mean square, nats),
how far outputs are (relative length), and the bound by which the kernel decides that a tile is
multiplied without 8 bits (lowering/cpu/kernels/scores_int8.h): its mean and greatest over tiles.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from mpass.inspection.text_table import open_console
from mpass.lowering.index import BLOCK
from mpass.lowering.reference.attention import repeat_kv
from mpass.models.load import load_model
from mpass.models.texts import find_text, load_tokens

EVERY = 4
ROWS = 128

Layer = tuple[Tensor, Tensor, Tensor, float]


def attentions(model: torch.nn.Module, tokens: Tensor) -> list[Layer]:
    """Query, key, value [1, H, N, D] in fp32 and scale of every attention of a prompt."""
    found: list[Layer] = []
    original = F.scaled_dot_product_attention

    def keep(query: Tensor, key: Tensor, value: Tensor, *rest: object, **named: object) -> Tensor:
        scale = named.get("scale")
        scale = float(scale) if isinstance(scale, float) else query.shape[-1] ** -0.5
        heads = query.shape[1]
        keys, values = (repeat_kv(tensor.float(), heads) for tensor in (key, value))
        found.append((query.float(), keys, values, scale))
        return original(query, key, value, *rest, **named)

    F.scaled_dot_product_attention = keep
    try:
        with torch.no_grad():
            model.get_decoder()(tokens)
    finally:
        F.scaled_dot_product_attention = original
    return found[::EVERY]


def rotation(size: int) -> Tensor:
    """The orthogonal Hadamard matrix [size, size]; size: a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rounded(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Rows [1, H, N, D] in steps of each `block` rows, and the steps [1, H, N, 1]."""
    most = rows.abs().amax(-1, keepdim=True).unflatten(2, (-1, block)).amax(3, keepdim=True)
    steps = most.expand(-1, -1, -1, block, -1).flatten(2, 3).clamp(min=1e-20) / 127
    return (rows / steps).round() * steps, steps


def off_by(layer: Layer, subtracted: bool, rotated: bool, block: int) -> list[float]:
    """Root mean square of the scores' errors, relative error of outputs, bound: mean, greatest."""
    query, key, value, scale = layer
    length = query.shape[2]
    rows = torch.arange(length - 1, 0, -max(1, length // ROWS)).flip(0)
    seen = torch.ones(length, length, dtype=torch.bool).tril()[rows]
    key = key - key.mean(2, keepdim=True) if subtracted else key
    exact = query[:, :, rows] @ key.mT * scale
    if rotated:
        query, key = (rows_ @ rotation(query.shape[-1]) for rows_ in (query, key))
    (near_query, query_step), (near_key, key_step) = rounded(query, block), rounded(key, block)
    near = near_query[:, :, rows] @ near_key.mT * scale
    error = (near - exact)[:, :, seen]
    outputs = [
        scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value for scores in (exact, near)
    ]

    def most(numbers: Tensor) -> Tensor:
        return numbers.unflatten(2, (-1, BLOCK)).amax(3)[..., 0]

    squares = [most((tensor * tensor).sum(-1, keepdim=True)) for tensor in (query, key)]
    steps = [most(query_step) ** 2, most(key_step) ** 2]
    bound = steps[0][..., None] * squares[1][:, :, None]
    bound = bound + squares[0][..., None] * steps[1][:, :, None]
    bound = scale * (bound / 12).sqrt()
    tiles = torch.ones(bound.shape[-2:], dtype=torch.bool).tril()
    return [
        error.square().mean().sqrt().item(),
        ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item(),
        bound[:, :, tiles].mean().item(),
        bound[:, :, tiles].max().item(),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="code")
    parser.add_argument("--length", type=int, default=2048, help="a multiple of 64")
    settings = parser.parse_args()
    model, tokenizer = load_model(settings.model, dtype=torch.bfloat16)
    tokens = load_tokens(find_text(settings.text).read(), tokenizer, settings.length)
    layers = attentions(model, tokens)
    table = Table("mean key", "rotation", "step per", "scores", "outputs", "bound", "at most")
    for subtracted, rotated, block in product((False, True), (False, True), (BLOCK, 1)):
        found = torch.tensor([off_by(layer, subtracted, rotated, block) for layer in layers])
        table.add_row(
            "subtracted" if subtracted else "kept",
            "yes" if rotated else "no",
            "row" if block == 1 else "block",
            *(f"{number:.4f}" for number in found[:, :3].mean(0).tolist()),
            f"{found[:, 3].max():.3f}",
        )
    open_console().print(table)


if __name__ == "__main__":
    main()
