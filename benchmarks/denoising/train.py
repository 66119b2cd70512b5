"""Train the DiT of dit.py on a CPU, in two parts:

    train.py --side 48 --batch 8 --steps 250 --horizon 1070 --weights a.pt
    train.py --side 96 --batch 2 --steps 75 --horizon 222 --rate 0.5 --seed 1 --start a.pt \\
        --weights dit.pt

The first part is at a quarter of the tokens (24 x 24), since positions are relative to the picture;
the second at 48 x 48 = 2304. Together they take about 4 minutes of CPU time in one thread, and
leave a weak model; more steps and a larger horizon make a better one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from dit import KINDS, DiT, pictures

RATE = 2e-3
AVERAGED = 0.995
"""What is saved is the running mean of the weights, with this share of the mean in each step."""


def train(model: DiT, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The mean of the weights over the last steps. Prints the loss now and then."""
    generator = torch.Generator().manual_seed(args.seed)
    mean = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    began, losses = time.process_time(), []
    for step in range(args.steps):
        falling = (1 - step / args.horizon) ** 0.5
        for group in optimizer.param_groups:
            group["lr"] = args.rate * RATE * min(1.0, (step + 1) / 50) * falling
        x, kind = pictures(args.batch, args.side, generator)
        kind = torch.where(torch.rand(args.batch, generator=generator) < 0.1, KINDS, kind)
        at = torch.sigmoid(torch.randn(args.batch, generator=generator))
        noise = torch.randn(x.shape, generator=generator)
        mixed = torch.lerp(noise, x, at[:, None, None, None])
        loss = F.mse_loss(model(mixed, at, kind), x - noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        keep = min(AVERAGED, (step + 1) / (step + 11))
        for name, weight in model.state_dict().items():
            mean[name].lerp_(weight, 1 - keep)
        if step % 25 == 24:
            recent = sum(losses[-25:]) / 25
            spent = time.process_time() - began
            print(f"step {step + 1} {spent:.0f} s loss {recent:.4f}", flush=True)
            torch.save(mean, args.weights)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="the file to write")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--side", type=int, required=True, help="pixels of a side, 2 per token")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--horizon", type=int, required=True, help="step at which the rate is 0")
    parser.add_argument("--rate", type=float, default=1.0, help=f"factor of the rate {RATE}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = DiT()
    if args.start:
        model.load_state_dict(torch.load(args.start))
    torch.save(train(model, args), args.weights)


if __name__ == "__main__":
    main()
