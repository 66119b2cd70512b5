"""An encoder whose attention sees both sides: patterns of its own kind, and padding.

    python examples/encoder.py

Attention that is not causal becomes sparse where the pattern serves it, as block_sparse does; the
report says why not where it does not.
"""

import sys

import torch
from torch import nn

import mpass


class Encoder(nn.Module):
    """Two layers. Dynamo compiles no module of torch.nn by itself, only those that call one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """x: [B, N, 256]; padding: bool [B, N], True for what is no token."""
        return self.layers(x, src_key_padding_mask=padding)


def main(length: str = "4096") -> None:
    """Encode a padded batch dense and sparse, and print how far the results are apart."""
    torch.manual_seed(0)
    encoder = Encoder().eval()
    x = torch.randn(2, int(length), 256)
    padding = torch.zeros(2, int(length), dtype=torch.bool)
    padding[1, -int(length) // 4 :] = True

    with torch.no_grad():
        dense = encoder(x, padding)
        mpass.compile(encoder, pattern="block_sparse(16)", min_seq_len=512)
        sparse = encoder(x, padding)
    print(mpass.last_report())
    difference = (sparse - dense)[~padding].norm() / dense[~padding].norm()
    print(f"relative difference: {difference:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
