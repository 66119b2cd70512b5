"""How near to fp32 a model in bf16 comes with linear layers in half precision, and without.

    python -m benchmarks.linear_exactness --json benchmarks/results/linear_exactness.json
    python -m benchmarks.linear_exactness --model gemma3 --json FILE
    python -m benchmarks.linear_exactness --layers-only   # single layers on made numbers alone

The truth is the same model with its bf16 weights made fp32, everything computed in fp32 and all
keys attended to. Beside it, all dense: the model in bf16 as torch runs it eagerly, which rounds the
result of every op to bf16; eager with every linear layer in half precision; and compiled by
`backend="minference"` with `linear="fp32"` and with `linear="half"`. Printed are the
Kullback-Leibler divergence from the truth, nats per token, the loss over the truth's, and the
divergence of half precision over that of eager bf16, like with like and compiled; then what
single layers are off by, on the rows that the model gives them and on made ones, over the length of
the exact result, in fp64. For made rows, "input" is what the rounding of the rows to bf16 has lost
before any layer begins.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mpass.evaluate.environment import describe_environment
from mpass.evaluate.score import spread_positions, standard_error
from mpass.inspection.text_table import open_console
from mpass.lowering.cpu.linear import linear_in_fp32
from mpass.lowering.cpu.linear_half import linear_in_half
from mpass.models.load import load_model
from mpass.models.prefill import compile_body, logits, prefill
from mpass.models.texts import TEXTS, find_text, load_tokens

NUMBERS_OF_LOGITS = 1 << 25
"""Logits of a way that exist at the same time."""

ROWS = 256
"""Rows of each layer that are held against fp64: the first 32, and others spread over the text."""

Layer = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LAYERS: dict[str, Layer] = {"eager": F.linear, "fp32": linear_in_fp32, "half": linear_in_half}
WAYS = ("eager", "eager, half", "fp32", "half")
RATIOS = {"layers alone": "eager, half", "compiled": "half"}
"""Of divergences over eager's, by their names in the table."""

LAYER_OF_WAY = {"eager": "eager", "eager, half": "half", "fp32": "fp32", "half": "half"}

DEPTHS = (8, 64, 576, 1536, 8960)
"""Inputs of layers on made numbers."""


def in_fp32(model: Any) -> Any:
    """A copy of a model in fp32 with the weights, and the factors, that it has in bf16."""
    wide = copy.deepcopy(model).float()
    for module in wide.modules():
        factor = getattr(module, "embed_scale", None)  # Gemma's, which bf16 rounds
        if isinstance(factor, Tensor):
            module.embed_scale = factor.bfloat16().float()
    return wide


@contextmanager
def layers_by(model: nn.Module, layer: Layer) -> Iterator[None]:
    """Let every nn.Linear of a model compute by a function, while this lasts."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                own = module

                def forward(x: Tensor, own: nn.Linear = own) -> Tensor:
                    return layer(x, own.weight, own.bias)

                module.forward = forward  # type: ignore[method-assign]
                stack.callback(delattr, module, "forward")
        yield


@torch.no_grad()
def distances(
    wide: Any, model: Any, truth: Tensor, hidden: dict[str, Tensor], tokens: Tensor, scored: int
) -> dict[str, dict[str, float]]:
    """Of each way by its last hidden states [1, N, hidden]: divergence, loss, its error."""
    chunk = max(1, NUMBERS_OF_LOGITS // wide.get_output_embeddings().out_features)
    found: dict[str, list[Tensor]] = {name: [] for name in hidden}
    known: list[Tensor] = []
    for positions in spread_positions(tokens.shape[1] - 1, scored).split(chunk):
        wanted = tokens[0, positions + 1, None]
        expected = logits(wide, truth[0, positions]).log_softmax(-1)
        known.append(-expected.gather(-1, wanted)[:, 0].double())
        weight = expected.exp()
        for name, states in hidden.items():
            with layers_by(model, LAYERS[LAYER_OF_WAY[name]]):
                scores = logits(model, states[0, positions])
            off = (scores - scores.mean(-1, True)) - (expected - expected.mean(-1, True))
            scores = scores.log_softmax(-1)
            divergence = torch.linalg.vecdot(weight, expected - scores).double()
            loss = -scores.gather(-1, wanted)[:, 0].double()
            found[name].append(torch.stack([divergence, loss, off.square().mean(-1).double()]))
    exact = torch.cat(known)
    result = {}
    for name, parts in found.items():
        divergence, loss, square = torch.cat(parts, 1)
        result[name] = {
            "divergence": float(divergence.mean()),
            "divergence_error": standard_error(divergence),
            "more": float((loss - exact).mean()),
            "more_error": standard_error(loss - exact),
            "logits_off": float(square.mean().sqrt()),
        }
    result["truth"] = {"loss": float(exact.mean())}
    return result


def layer_errors(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, dict[str, float]]:
    """How far each kind of layer is off on rows [N, K], relative: all rows, and the worst one."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    lengths = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    result = {}
    for name, layer in LAYERS.items():
        off = layer(x, weight, bias).double() - exact
        result[name] = {
            "all": float(off.norm() / exact.norm()),
            "worst_row": float((off.norm(dim=-1) / lengths).max()),
        }
    return result


@torch.no_grad()
def errors_of_layers(model: Any, tokens: Tensor) -> dict[str, dict[str, Any]]:
    """`layer_errors` of every linear layer on what the eager model gives it, by its name."""
    body, found = model.get_decoder(), dict[str, dict[str, Any]]()
    count = tokens.shape[1]
    chosen = torch.cat([torch.arange(32), torch.arange(32, count, max(1, count // (ROWS - 32)))])
    with ExitStack() as stack:
        for name, module in body.named_modules():
            if isinstance(module, nn.Linear):
                own = module

                def look(
                    _: Any, args: Any, out: Any, name: str = name, own: nn.Linear = own
                ) -> None:
                    x = args[0].reshape(-1, args[0].shape[-1])[chosen]
                    largest = x.float().abs().amax(-1) / x.float().square().mean(-1).sqrt()
                    found[name] = {
                        **layer_errors(x, own.weight, own.bias),
                        "largest_over_rms": float(largest.max()),
                    }

                stack.callback(module.register_forward_hook(look).remove)
        prefill(body.forward, tokens)
    return found


def made_rows(depth: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows [192, depth] and weights [128, depth], fp32, that are hard on sums, by what they are."""
    generator = torch.Generator().manual_seed(depth)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight = normal(192, depth), normal(128, depth)
    half = depth // 2
    cancelling = torch.cat([x[:, :half], -x[:, :half] * (1 + normal(192, half) * 0.01)], 1)
    outlier = x.clone()
    outlier[:, depth // 3] = 1e4
    sizes = torch.exp2(-40 * torch.rand(192, depth, generator=generator))
    return {
        "normal": (x, weight),
        "of one sign": (x.abs(), weight.abs()),
        "all numbers of a row equal": (x[:, :1].expand(-1, depth), weight),
        "sums that cancel to 1%": (cancelling, torch.cat([weight[:, :half]] * 2, 1)),
        "one number 1e4 times the rest": (outlier, weight),
        "that number met by a weight of 0": (
            outlier,
            weight * (torch.arange(depth) != depth // 3),
        ),
        "sizes from 1 to 2^-40": (x * sizes, weight),
        "subnormal in bf16": (x * 1e-39, weight),
    }


def errors_of_made_rows() -> dict[str, dict[str, dict[str, Any]]]:
    """`layer_errors` on rows that no model gives, by what they are and by depth."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for depth in DEPTHS:
        for kind, (x, weight) in made_rows(depth).items():
            weight = weight.bfloat16()
            exact = x.double() @ weight.double().t()
            rounded = x.bfloat16().double() @ weight.double().t()
            errors: dict[str, Any] = layer_errors(x.bfloat16(), weight, None)
            errors["input"] = float((rounded - exact).norm() / exact.norm())
            found.setdefault(kind, {})[str(depth)] = errors
    return found


def measure_model(settings: argparse.Namespace) -> dict[str, Any]:
    """Distances on every text, and the errors of every layer on the first."""
    model, tokenizer = load_model(settings.model, dtype=torch.bfloat16)
    wide = in_fp32(model)
    dense = {"min_seq_len": 1 << 30}
    forwards = {
        "eager": model.get_decoder().forward,
        "eager, half": model.get_decoder().forward,
        "fp32": compile_body(model, "minference", {**dense, "linear": "fp32"}),
        "half": compile_body(model, "minference", {**dense, "linear": "half"}),
    }
    texts = {}
    for text in settings.texts:
        tokens = load_tokens(find_text(text).read(), tokenizer, settings.length)
        truth = prefill(wide.get_decoder().forward, tokens).last_hidden_state
        hidden = {}
        for name, forward in forwards.items():
            print(f"{text}, {name}", file=sys.stderr, flush=True)
            with ExitStack() as stack:
                if name == "eager, half":
                    stack.enter_context(layers_by(model, linear_in_half))
                hidden[name] = prefill(forward, tokens).last_hidden_state
        texts[text] = found = distances(wide, model, truth, hidden, tokens, settings.scored)
        print({name: found[name]["divergence"] for name in WAYS}, file=sys.stderr, flush=True)
    del wide
    tokens = load_tokens(find_text(settings.texts[0]).read(), tokenizer, settings.length)
    return {"texts": texts, "layers": errors_of_layers(model, tokens)}


def print_model(found: dict[str, Any]) -> None:
    """The tables of a model."""
    table = Table("text", "loss in fp32", *(f"{name}: divergence, loss" for name in WAYS), *RATIOS)
    for text, ways in found["texts"].items():
        table.add_row(
            text,
            f"{ways['truth']['loss']:.4f}",
            *(
                f"{ways[w]['divergence']:.6f}, {ways[w]['more']:+.4f} ± {ways[w]['more_error']:.4f}"
                for w in WAYS
            ),
            *(
                f"{ways[way]['divergence'] / ways['eager']['divergence']:.3f}"
                for way in RATIOS.values()
            ),
        )
    open_console().print(table)
    layers = found["layers"]
    worst = sorted(layers, key=lambda n: -layers[n]["half"]["all"] / layers[n]["eager"]["all"])
    table = Table("layer", *(f"{name}: all, worst row" for name in LAYERS), "half / eager")
    for name in worst[:8]:
        ratio = layers[name]["half"]["all"] / layers[name]["eager"]["all"]
        table.add_row(name, *cells(layers[name]), f"{ratio:.3f}")
    open_console().print(table)


def cells(errors: dict[str, Any]) -> list[str]:
    return [f"{errors[name]['all']:.2e}, {errors[name]['worst_row']:.2e}" for name in LAYERS]


def print_made(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The table of made rows."""
    table = Table("rows", "inputs", "input", *(f"{name}: all, worst row" for name in LAYERS))
    for kind, depths in found.items():
        for depth, errors in depths.items():
            table.add_row(kind, depth, f"{errors['input']:.2e}", *cells(errors))
    open_console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=1024, help="positions of each text")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--layers-only", action="store_true", help="made rows and no model")
    parser.add_argument("--json", type=Path, help="add the figures to this file, by model")
    settings = parser.parse_args()
    kept = json.loads(settings.json.read_text()) if settings.json and settings.json.exists() else {}
    found: dict[str, Any] = {"made rows": errors_of_made_rows()}
    print_made(found["made rows"])
    if not settings.layers_only:
        model = measure_model(settings)
        print_model(model)
        found[Path(settings.model).name] = {
            "length": settings.length,
            "scored": settings.scored,
            "environment": describe_environment(),
            **model,
        }
    if settings.json:
        settings.json.write_text(json.dumps({**kept, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
