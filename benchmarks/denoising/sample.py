"""How far samples are from dense ones when attention keeps what it leaves out over the steps.

    python benchmarks/denoising/sample.py --weights dit.pt --steps 50 --json FILE \\
        "a_shape(0, 257) full=5 every=8" "a_shape(0, 257) keep=output full=5 every=3"

A setting is a pattern and numbers of mpass.denoising, or `plan=0.4`: a plan of so many cells that
`mpass.search_denoising` finds on other pictures; `grid=1` sees the patches in tiles. All start from
the same noise: a picture with a square and one with dots, 2304 tokens, 4 layers, velocity by
Euler's rule, without guidance.
Prints and stores per setting: PSNR and SSIM to the pictures of dense attention (their mean and the
worst), the share of cells that was computed, CPU seconds of attention over all steps by those of
dense attention, in one thread, and the graphs that were compiled. Attention is timed by itself, on
its operands of one layer and step, each kind of step in turn with dense attention. `--features`
adds the mean distance of DINOv2's features (1 - cosine), by the weights that vision.py names.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dit import DiT, noise_for
from torch import Tensor
from torch._dynamo.utils import counters

import mpass

SIDE = 96
WANTED, SEARCHED = (1, 3), (0, 2)
"""Classes of the pictures, and of those on which plans are searched."""

ROUNDS = 3
"""How often each kind of step is timed."""


@dataclass(frozen=True)
class Setting:
    """A pattern, what mpass.denoising is given, and whether patches are seen in tiles."""

    text: str
    pattern: str
    numbers: dict[str, Any]
    grid: bool = False


def parse_setting(text: str) -> Setting:
    """`a_shape(0, 257) full=5 keep=output`."""
    pattern, _, rest = text.partition(")")
    numbers: dict[str, Any] = {}
    for part in rest.split():
        name, _, value = part.partition("=")
        numbers[name] = value if name == "keep" else json.loads(value)
    return Setting(text, pattern + ")", numbers, bool(numbers.pop("grid", 0)))


def sample(
    model: Callable[..., Tensor],
    steps: int,
    run: mpass.DenoisingRun | None,
    kinds: tuple[int, ...] = WANTED,
) -> Tensor:
    """A picture of each wanted class [B, 3, SIDE, SIDE], from noise in `steps` steps."""
    kind = torch.tensor(kinds)
    x = noise_for(kind, SIDE, int(kinds is SEARCHED))
    with torch.no_grad():
        for step in run.over(range(steps)) if run else range(steps):
            x = x + model(x, torch.full(kind.shape, step / steps), kind) / steps
    return x


def psnr(picture: Tensor, true: Tensor) -> list[float]:
    """Per picture in dB; pictures are from -1 to 1."""
    error = ((picture.clamp(-1, 1) - true.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return [round(float(value), 2) for value in -10 * error.log10()]


def ssim(picture: Tensor, true: Tensor) -> list[float]:
    """Per picture: the mean over places and colours, Gaussian windows of 11 (Wang et al., 2004)."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)
    a, b = ((t.clamp(-1, 1) + 1) / 2 for t in (picture, true))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return [round(float(value), 4) for value in index.mean((1, 2, 3))]


@functools.cache
def feature_model(path: Path) -> Any:
    """DINOv2-small, of vision.py."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from vision import load_dinov2

    return load_dinov2(path)


def feature_distance(picture: Tensor, true: Tensor, weights: Path) -> float:
    """1 - the cosine of DINOv2's features of patches, at 224 pixels; the mean over all."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(x: Tensor) -> Tensor:
        x = (x.clamp(-1, 1) + 1) / 2
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        seen: Tensor = feature_model(weights)(pixel_values=x).last_hidden_state[:, 1:]
        return seen

    with torch.no_grad():
        cosine = F.cosine_similarity(features(picture), features(true), dim=-1)
    return round(1 - float(cosine.mean()), 5)


def options_of(setting: Setting) -> dict[str, Any]:
    """What torch.compile is given. Nothing decides by cost: the setting is what is measured."""
    own = {"pattern": setting.pattern, "denoising": True, "dense_above": 2.0}
    return own | {"inner_backend": "eager"} | ({"grid": "square"} if setting.grid else {})


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def attention_share(
    setting: Setting, numbers: dict[str, Any], steps: int, operands: tuple[Tensor, ...]
) -> float:
    """CPU seconds of attention over all steps by those of dense attention."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="minference", options=options_of(setting))
    compiled(*operands)
    dense: list[float] = []
    by_kind: dict[object, list[float]] = {}
    with torch.no_grad():
        for _ in range(ROUNDS):
            with mpass.denoising(steps, **numbers) as run:
                kinds = [run.schedule.at(step, 0) for step in range(steps)]
                seen: dict[object, int] = {}
                for step in run.over(range(steps)):
                    seen[kinds[step]] = seen.get(kinds[step], 0) + 1
                    if seen[kinds[step]] > 3 and not kinds[step].kept:
                        continue  # a kind of step is timed three times in a round
                    begin = time.process_time()
                    compiled(*operands)
                    middle = time.process_time()
                    attention(*operands)
                    by_kind.setdefault(kinds[step], []).append(middle - begin)
                    dense.append(time.process_time() - middle)
    total = sum(statistics.median(by_kind[kind]) for kind in kinds)
    return total / (steps * statistics.median(dense))


def measure(
    setting: Setting, model: DiT, steps: int, true: Tensor, features: Path | None = None
) -> dict[str, Any]:
    """One row: the setting and what came of it."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="minference", options=options_of(setting))
    numbers = dict(setting.numbers)
    cells_allowed = numbers.pop("plan", None)
    if cells_allowed is not None:
        numbers["plan"] = mpass.search_denoising(
            lambda run: sample(compiled, steps, run, SEARCHED),
            steps,
            cells=cells_allowed,
            full=3 if steps == 50 else 2,
            ranges=3 if steps == 50 else 2,  # each begins with a whole step
        )
    begin = time.process_time()
    with mpass.denoising(steps, **numbers) as run:
        picture = sample(compiled, steps, run)
    seconds = time.process_time() - begin
    graphs = counters["stats"]["unique_graphs"]
    torch.manual_seed(0)
    operands = tuple(torch.randn(len(WANTED), 2, (SIDE // 2) ** 2, 64) for _ in range(3))
    query, key, _ = operands
    cells = float(mpass.density(query, key, pattern=setting.pattern, is_causal=False).mean())
    # What each attention does at each step; all alike but under a plan.
    plan = numbers.get("plan")
    apart = [mpass.DenoisingPlan(steps, (own,)) for own in plan.attentions] if plan else []
    rules = [one.at(step, 0) for one in apart or [run.schedule] for step in range(steps)]
    whole = sum(rule.full for rule in rules) / len(rules)
    between = [0.0 if rule.keep == "output" else cells for rule in rules if not rule.full]
    shares = [
        attention_share(setting, {"plan": own} if own else numbers, steps, operands)
        for own in apart or [None]
    ]
    ratios = psnr(picture, true)
    likeness = ssim(picture, true)
    return {
        "setting": setting.text,
        "steps": steps,
        "full_steps": round(whole * steps, 2),
        "psnr": round(statistics.mean(ratios), 2),
        "psnr_least": min(ratios),
        "ssim": round(statistics.mean(likeness), 4),
        "ssim_least": min(likeness),
        "feature_distance": feature_distance(picture, true, features) if features else None,
        "cells_all_steps": round(whole + sum(between) / len(rules), 4),
        "cells_between": round(statistics.mean(between or [0.0]), 4),
        "attention_share": round(statistics.mean(shares), 3),
        "cpu_seconds": round(seconds, 1),
        "graphs": graphs,
        "kept_bytes": run.num_bytes,
        "sha256": hashlib.sha256(picture.numpy().tobytes()).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="rows are added to this file")
    parser.add_argument("--dense", type=Path, help="the dense pictures are kept there")
    parser.add_argument("--features", type=Path, help="weights of DINOv2, see vision.py")
    parser.add_argument("--pictures", type=Path, help="the dense pictures go there, as PPM")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = DiT().eval()
    model.load_state_dict(torch.load(args.weights))
    if args.dense and args.dense.exists():
        true = torch.load(args.dense)
    else:
        begin = time.process_time()
        true = sample(model, args.steps, None)
        print(f"dense: {time.process_time() - begin:.1f} CPU s, {args.steps} steps", flush=True)
        if args.dense:
            torch.save(true, args.dense)
    if args.pictures:
        row = torch.cat(list(true), -1).clamp(-1, 1).add(1).mul(127.5).byte().permute(1, 2, 0)
        header = f"P6 {row.shape[1]} {row.shape[0]} 255\n".encode()
        args.pictures.write_bytes(header + row.contiguous().numpy().tobytes())
    for text in args.settings:
        row = measure(parse_setting(text), model, args.steps, true, args.features)
        print(json.dumps(row), flush=True)
        if args.json:
            rows = json.loads(args.json.read_text()) if args.json.exists() else []
            args.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
