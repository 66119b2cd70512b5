"""mpass: sparse attention prefill as a torch.compile backend, `backend="minference"`.

Names are loaded when they are first used, so that importing mpass costs nothing. Tools that read
types find them in `__init__.pyi`.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any

__version__ = "0.1.0"
"""The one place that says the version; the build reads it here."""

_EXPORTS = {
    "AShape": "mpass.patterns.a_shape",
    "BlockMax": "mpass.patterns.block_max",
    "BlockSparse": "mpass.patterns.block_sparse",
    "BlockTopP": "mpass.patterns.block_top_p",
    "Dense": "mpass.patterns.dense",
    "FlexPrefill": "mpass.patterns.flex_prefill",
    "Grid": "mpass.lowering.tiles",
    "SampleAttention": "mpass.patterns.sample_attention",
    "SnapKV": "mpass.lowering.kv_selection",
    "KVSelection": "mpass.lowering.kv_selection",
    "denoising": "mpass.lowering.denoising",
    "DenoisingRun": "mpass.lowering.denoising",
    "DenoisingPlan": "mpass.lowering.denoising_plan",
    "search_denoising": "mpass.calibration.denoising",
    "select_keys": "mpass.lowering.kv_selection",
    "compress": "mpass.serving.kv_cache",
    "Pattern": "mpass.patterns.base",
    "Report": "mpass.report",
    "Strided": "mpass.patterns.strided",
    "TriShape": "mpass.patterns.tri_shape",
    "Union": "mpass.patterns.union",
    "VerticalBlock": "mpass.patterns.union",
    "VerticalSlash": "mpass.patterns.vertical_slash",
    "XAttention": "mpass.patterns.x_attention",
    "LayerConfig": "mpass.config.layer",
    "SparseConfig": "mpass.config.sparse_config",
    "attend": "mpass.functional",
    "calibrate": "mpass.calibration.search",
    "compile": "mpass.backend",
    "configure": "mpass.config.decorators",
    "MpassError": "mpass.errors",
    "diagnose": "mpass.inspection.doctor",
    "explain": "mpass.inspection.explanation",
    "profile": "mpass.inspection.profiling",
    "computed_mask": "mpass.functional",
    "density": "mpass.functional",
    "rewrite_exported": "mpass.exported",
    "sparse_attention": "mpass.functional",
    "record": "mpass.lowering.recorder",
    "register_attention": "mpass.serving.transformers_attention",
    "last_report": "mpass.story.merge",
    "reports": "mpass.report",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name) or _pattern_module(name)
    if module:
        return getattr(importlib.import_module(module), name)
    if not name.startswith("_") and importlib.util.find_spec(f"mpass.{name}"):
        return importlib.import_module(f"mpass.{name}")
    raise AttributeError(f"module 'mpass' has no attribute {name!r}")


def _pattern_module(name: str) -> str:
    """The file of a pattern whose class is not listed: `LogSparse` stands in log_sparse.py.

    It is "" where there is no such file.
    """
    if not re.fullmatch("([A-Z][a-z0-9]*)+", name):
        return ""
    module = "mpass.patterns." + re.sub("(?<!^)(?=[A-Z])", "_", name).lower()
    return module if importlib.util.find_spec(module) else ""


def __dir__() -> list[str]:
    return sorted(__all__)
