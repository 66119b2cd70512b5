"""Train the DiT of dit.py on a CPU: `python benchmarks/denoising/train.py --weights dit.pt`.

Most steps are at a quarter of the tokens (24 x 24), since positions are relative to the picture;
the last ones are at 48 x 48 = 2304. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from dit import KINDS, DiT, pictures

AVERAGED = 0.995
"""What is saved is the running mean of the weights, with this share of the mean in each step."""


def train(small: float, large: float, seed: int) -> dict[str, torch.Tensor]:
    """Weights after `small` CPU seconds at 576 tokens and `large` at 2304."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = DiT()
    mean = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps, began, losses = 0, time.process_time(), []
    for seconds, side, batch in ((small, 48, 8), (large, 96, 2)):
        phase = time.process_time()
        while (spent := time.process_time() - phase) < seconds:
            share = (time.process_time() - began) / (small + large)
            rate = 2e-3 * min(1.0, (steps + 1) / 50) * (1 - share) ** 0.5
            for group in optimizer.param_groups:
                group["lr"] = rate if side == 48 else rate * 0.5
            x, kind = pictures(batch, side, generator)
            kind = torch.where(torch.rand(batch, generator=generator) < 0.1, KINDS, kind)
            # Larger pictures need more noise to hide as much (arXiv 2301.10972).
            at = torch.sigmoid(torch.randn(batch, generator=generator))
            noise = torch.randn(x.shape, generator=generator)
            mixed = torch.lerp(noise, x, at[:, None, None, None])
            loss = F.mse_loss(model(mixed, at, kind), x - noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            losses.append(loss.item())
            keep = min(AVERAGED, steps / (steps + 10))
            for name, weight in model.state_dict().items():
                mean[name].lerp_(weight, 1 - keep)
            if steps % 50 == 0:
                recent = sum(losses[-50:]) / 50
                print(f"side {side} step {steps} {spent:.0f} s loss {recent:.4f}", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="the file to write")
    parser.add_argument("--small", type=float, default=330.0, help="CPU seconds at 576 tokens")
    parser.add_argument("--large", type=float, default=270.0, help="CPU seconds at 2304 tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.save(train(args.small, args.large, args.seed), args.weights)


if __name__ == "__main__":
    main()
