"""Linear layers that are 2:4 sparse, in 8 bits, or both, under sparse attention (as GPUSQ-ViT's).

    make quantized                                    # torchao in a Python of its own
    python benchmarks/quantized.py smollm2 --length 2304
    python benchmarks/quantized.py dinov2 --weights vit_s_focus.onnx --side 51

Per kind of weights: attentions found and made sparse, graph breaks, and how far the output with
full budgets is from the same model run eagerly (relative L2 distance). The control is the same
distance of two eager runs, the second of inputs that are moved by 1e-6 of their size: where
activations are rounded to 8 bits such a step flips some of them, and no way to run a model is
nearer to another. Weights are cut 2:4 by size and not trained after that. Numbers are fp32, 8-bit
layers torchao's Int8DynamicActivationInt8WeightConfig. torchao has semi-structured kernels on
GPUs only: on a CPU zeros are multiplied.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

OPTIONS = {"inner_backend": "eager", "pattern": "block_sparse(1000)", "dense_above": 2.0}
"""Under which sparse attention computes every cell."""

MOVED = 1e-6

Run = Callable[[Any, Tensor], Tensor]


def cut_two_of_four(model: nn.Module) -> None:
    """Set the two smallest of each four weights along a linear layer's inputs to zero."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.in_features % 4 == 0:
            fours = layer.weight.data.unflatten(1, (-1, 4))
            smallest = fours.abs().argsort(-1)[..., :2]
            layer.weight.data = fours.scatter(-1, smallest, 0.0).flatten(1)


def to_eight_bits(model: nn.Module) -> None:
    """Weights and, at run time, activations of linear layers in 8 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def both(model: nn.Module) -> None:
    """2:4, then 8 bits."""
    cut_two_of_four(model)
    to_eight_bits(model)


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "as they are": lambda model: None,
    "2:4": cut_two_of_four,
    "8 bits": to_eight_bits,
    "2:4 in 8 bits": both,
}


def distance(out: Tensor, true: Tensor) -> float:
    """Relative, by L2 norms."""
    return float((out.double() - true.double()).norm() / true.double().norm())


def measure(kind: str, plain: nn.Module, run: Run, given: Tensor) -> dict[str, Any]:
    """One row: what became of a model whose weights are of a kind."""
    model = copy.deepcopy(plain)
    KINDS[kind](model)
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(given.shape, generator=generator) * MOVED * given.std()
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        true = run(model, given)
        control = distance(run(model, given + step), true)
        compiled = torch.compile(model, backend="minference", options=OPTIONS)
        apart = distance(run(compiled, given), true)
    counted = counters["minference"]
    return {
        "weights": kind,
        "sites": counted["sites"],
        "sparse": counted["sparse_sites"],
        "breaks": sum(counters["graph_break"].values()),
        "distance": apart,
        "control": control,
    }


def run_text(model: Any, embedded: Tensor) -> Tensor:
    """The last hidden states of a language model."""
    state: Tensor = model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return state


def run_picture(model: Any, picture: Tensor) -> Tensor:
    """The features of a vision transformer."""
    state: Tensor = model(pixel_values=picture).last_hidden_state
    return state


def load(args: argparse.Namespace) -> tuple[nn.Module, Run, Tensor]:
    """The model, how it is run, and its input."""
    if args.model == "dinov2":
        from vision import PATCH, load_dinov2, load_picture

        side = args.side
        size = (1, 3, side * PATCH, side * PATCH)
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
        picture = load_picture(args.picture, side) if args.picture else drawn
        return load_dinov2(args.weights), run_picture, picture
    from mpass.models.load import load_model
    from mpass.models.texts import find_text

    model, tokenizer = load_model(args.model, dtype=torch.float32)
    ids = tokenizer(find_text("alice").read(), return_tensors="pt").input_ids[:, : args.length]
    inner: Any = model.model
    with torch.no_grad():
        return inner, run_text, inner.embed_tokens(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model", choices=["smollm2", "dinov2"])
    parser.add_argument("--length", type=int, default=2304)
    parser.add_argument("--weights", type=Path, help="of DINOv2, see vision.py")
    parser.add_argument("--picture", type=Path, help="for DINOv2; noise if there is none")
    parser.add_argument("--side", type=int, default=51, help="patches per side")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, run, given = load(args)
    for kind in args.kinds:
        row = measure(kind, model, run, given)
        print(
            f"{args.model:8} {kind:14} {row['sparse']} of {row['sites']} sparse, "
            f"{row['breaks']} breaks, distance {row['distance']:.1e}, control {row['control']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
