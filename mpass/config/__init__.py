"""Which pattern each head of each layer uses, in code and in files."""

from mpass.config.sparse_config import LayerConfig, Span, SparseConfig

__all__ = ["LayerConfig", "Span", "SparseConfig"]
