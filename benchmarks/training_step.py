"""Time a LoRA step of a real model, sparse against Inductor's dense one, in one process, in turns.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --length 8192

prints CPU seconds of a step (forward, backward and the optimiser's), the least of the rounds, their
ratio and the loss of each. Low-rank parts of the projections of queries and values are trained; all
else is frozen. CPU time is used because ratios of it hold on a machine that others use as well.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import mpass
from mpass.models.load import load_model
from mpass.models.texts import find_text, load_tokens


class LoRA(nn.Module):
    """A frozen projection and a product of two thin matrices that is trained."""

    def __init__(self, inner: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.inner = inner.requires_grad_(False)
        like = {"dtype": inner.weight.dtype}
        self.down = nn.Parameter(torch.randn(rank, inner.in_features, **like) / math.sqrt(rank))
        self.up = nn.Parameter(torch.zeros(inner.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.mT @ self.up.mT


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="code")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=0, help="of the model, from below; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pattern", default="union")
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def trainable(options: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The model with low-rank parts that alone are trained, and its tokens [1, length]."""
    model, tokenizer = load_model(options.model, dtype=getattr(torch, options.dtype))
    torch.manual_seed(0)
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    model.requires_grad_(False).train()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    return model, load_tokens(find_text(options.text).read(), tokenizer, options.length)


def main() -> None:
    options = arguments()
    model, tokens = trainable(options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    settings = {"training": "sparse", "pattern": options.pattern}
    steps: dict[str, Callable[..., object]] = {
        "sparse": torch.compile(model, backend="minference", options=settings),
        "dense": torch.compile(model, backend="inductor"),
    }
    best: dict[str, float] = {}
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            loss = step(tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            spent = time.process_time() - start
            losses[name] = float(loss.detach())
            print(f"round {number}, {name}: {spent:.1f} s, loss {losses[name]:.4f}", flush=True)
            if number:  # the first one compiles
                best[name] = min(best.get(name, spent), spent)
            elif name == "sparse":
                print(mpass.last_report().summary(), flush=True)
    print(
        f"{options.model}, {len(model.model.layers)} layers, {options.length} tokens,"
        f" {options.dtype}, {options.pattern}, {torch.get_num_threads()} threads:"
        f" sparse {best['sparse']:.1f} s, dense {best['dense']:.1f} s,"
        f" ratio {best['sparse'] / best['dense']:.2f}"
    )


if __name__ == "__main__":
    main()
