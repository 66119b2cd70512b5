"""Where a measurement was made: versions, processor, GPU."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

import mpass


def describe_environment() -> dict[str, Any]:
    """Versions and machine: what a figure depends on."""
    import transformers

    return {
        "mpass": mpass.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
