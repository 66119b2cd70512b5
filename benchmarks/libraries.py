"""`mpass coverage --kind library`, in an environment that has the libraries.

    make libraries ARGS="-o libraries.jsonl"
    python -m benchmarks.libraries -o libraries.jsonl

timm, open_clip and segment-anything import torchvision, whose wheels on PyPI hold ops for GPUs that
a torch for CPUs cannot load. None of the programs calls one of these ops. Where they cannot be
loaded they are declared, so that torchvision can be imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

DECLARED = dict.fromkeys(
    ("nms", "qnms"), "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
)
"""The ops that torchvision names while it is imported."""


def declare_ops() -> torch.library.Library | None:
    """Declare what torchvision cannot load of itself; None where there is nothing to declare.

    The declarations last as long as what is returned.
    """
    spec = importlib.util.find_spec("torchvision")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    built = next(folder.glob("_C*.so"), None) if folder is not None else None
    if built is None:
        return None
    try:
        torch.ops.load_library(str(built))
    except (OSError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in DECLARED.items():
            library.define(name + schema)
        return library
    return None


def main() -> None:
    """Run the command with the arguments of this program."""
    declared = declare_ops()
    from mpass.cli.app import app

    if declared is not None:
        print("torchvision's ops are declared and not loaded: this torch has no GPU", flush=True)
    app(["coverage", "--kind", "library", *sys.argv[1:]])


if __name__ == "__main__":
    main()
