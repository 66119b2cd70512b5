"""What the tests of the offline search share: a toy language model, inputs and operands."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mpass
from mpass.calibration.instrument import AttentionOperands
from mpass.evaluate.samples import Sample
from mpass.lowering.index import AttentionMask
from tests.helpers.toys import Decoder

CANDIDATES = (mpass.AShape(16, 64), mpass.VerticalSlash(40, 120), mpass.BlockSparse(2))


class ToyLanguageModel(nn.Module):
    """Tokens [1, N] to logits [1, N, 50]."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.decoder = Decoder(depth=depth)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(3 * self.decoder(self.embedding(tokens)))


def operands(length: int = 500, offset: int = 0) -> AttentionOperands:
    query = torch.randn(1, 4, length - offset, 32) * 2
    key, value = torch.randn(1, 2, length, 32), torch.randn(1, 2, length, 16)
    return AttentionOperands(0, query, key, value, AttentionMask(True, offset), 0.2, 0.0, None)


def inputs(seed: int, length: int = 600) -> list:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (1, length), generator=generator)
    return [tokens, Sample(tokens[:, :400], ("x",), ((396, 400),), 396)]
