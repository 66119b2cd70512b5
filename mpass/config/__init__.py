"""Which pattern each head of each layer uses, in code and in files."""

from mpass.config.layer import LayerConfig
from mpass.config.spans import Span
from mpass.config.sparse_config import SparseConfig

__all__ = ["LayerConfig", "Span", "SparseConfig"]
