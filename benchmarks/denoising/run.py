"""The whole comparison of denoising.md by one command: trains the model once, and fills a table.

    python benchmarks/denoising/run.py --folder build/denoising --features vit_s_focus.onnx

Weights and dense samples are kept in the folder, and rows in `--json`: a run that was cut off goes
on where it stopped. 50 and 20 steps; 3%, 12.5% and 25% of the cells between whole steps; per share
the residual, its line through two, the plain window, a wider window and the last output at about
equal time, and a searched plan of about as many cells. The last row is run again in another
process: its picture must have the same bits. `--features` adds the distance of DINOv2's features
(the weights of vision.py; needs onnx). Training takes about 13 minutes of CPU time, a row half a
minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from dit import DiT
from sample import measure, parse_setting, sample
from train import train

HERE = Path(__file__).parent

PARTS = (
    {"side": 48, "batch": 8, "steps": 1050, "horizon": 1070, "rate": 1.0, "seed": 0},
    {"side": 96, "batch": 2, "steps": 215, "horizon": 222, "rate": 0.5, "seed": 1},
)
"""Training: at a quarter of the tokens, then at all of them."""

WINDOWS = {"3%": 1, "12.5%": 129, "25%": 257}
"""Windows of a_shape that have about these shares of the cells of 2304 tokens."""

AT_EQUAL_TIME = {
    50: {
        "3%": ("a_shape(0, 289) keep=nothing full=1 every=50", "full=3 every=5", 0.22),
        "12.5%": ("a_shape(0, 385) keep=nothing full=1 every=50", "full=3 every=4", 0.31),
        "25%": ("a_shape(0, 513) keep=nothing full=1 every=50", "full=3 every=3", 0.39),
    },
    20: {
        "3%": ("a_shape(0, 353) keep=nothing full=1 every=20", "full=2 every=4", 0.31),
        "12.5%": ("a_shape(0, 449) keep=nothing full=1 every=20", "full=3 every=4", 0.35),
        "25%": ("a_shape(0, 513) keep=nothing full=1 every=20", "full=2 every=3", 0.42),
    },
}
"""Per steps and share: a wider window without whole steps but the first, the whole steps of
reusing the last output, and the cells of a searched plan."""


def settings(steps: int) -> list[str]:
    """What is compared at a number of steps, see sample.py."""
    found = []
    plain = "full=3 every=6" if steps == 50 else "full=2 every=6"
    for share, window in WINDOWS.items():
        wide, whole, cells = AT_EQUAL_TIME[steps][share]
        pattern = f"a_shape(0, {window})"
        found += [
            f"{pattern} {plain}",
            f"{pattern} {plain} order=1",
            f"{pattern} {plain} keep=nothing",
            wide,
            f"{pattern} {whole} keep=output",
            f"{pattern} {whole} keep=output order=1",
            f"{pattern} plan={cells}",
        ]
    return found


def trained(folder: Path) -> DiT:
    """The model, trained if the folder has no weights."""
    model = DiT().eval()
    for number, part in enumerate(PARTS):
        path = folder / f"part{number}.pt"
        if not path.exists():
            half = folder / f"part{number}.half.pt"
            torch.manual_seed(0)
            weights = train(model, argparse.Namespace(**part, weights=half))
            torch.save(weights, path)
        model.load_state_dict(torch.load(path))
    return model


def dense_sample(model: DiT, steps: int, folder: Path) -> torch.Tensor:
    """The pictures that all rows are held against."""
    path = folder / f"dense{steps}.pt"
    if not path.exists():
        torch.save(sample(model, steps, None), path)
    return torch.load(path)


def same_bits(row: dict[str, Any], folder: Path) -> bool:
    """Whether another process comes to the same picture."""
    command = [sys.executable, str(HERE / "sample.py"), "--weights", str(folder / "part1.pt")]
    command += ["--steps", str(row["steps"]), "--dense", str(folder / f"dense{row['steps']}.pt")]
    told = subprocess.run(
        [*command, row["setting"]], check=True, capture_output=True, text=True
    ).stdout
    again = json.loads(told.splitlines()[-1])
    return bool(again["sha256"] == row["sha256"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True, help="of weights and samples")
    parser.add_argument("--json", type=Path, help="rows; default: rows.json in the folder")
    parser.add_argument("--features", type=Path, help="weights of DINOv2, see vision.py")
    parser.add_argument("--steps", type=int, nargs="+", choices=[50, 20], default=[50, 20])
    parser.add_argument("--only", default="", help="settings that hold this text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.json or args.folder / "rows.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    model = trained(args.folder).requires_grad_(False)
    done = {(row["steps"], row["setting"]) for row in rows}
    for steps in args.steps:
        true = dense_sample(model, steps, args.folder)
        for text in settings(steps):
            if (steps, text) in done or args.only not in text:
                continue
            row = measure(parse_setting(text), model, steps, true, args.features)
            print(json.dumps(row), flush=True)
            rows.append(row)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    if rows and "same_bits" not in rows[-1]:
        rows[-1]["same_bits"] = same_bits(rows[-1], args.folder)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        far = row.get("feature_distance")
        print(
            f"| {row['steps']} | `{row['setting']}` | {row['cells_between']:.1%} | "
            f"{row['full_steps']} | {row['psnr']:.1f} / {row['psnr_least']:.1f} | "
            f"{row['ssim']:.3f} | {'' if far is None else f'{far:.3f}'} | "
            f"{row['attention_share']:.0%} |"
        )
    if rows:
        print(f"the last row again in another process, same bits: {rows[-1]['same_bits']}")


if __name__ == "__main__":
    main()
