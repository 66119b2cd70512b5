"""Whether a config names layers or heads that a model does not have: known before it runs."""

from __future__ import annotations

from typing import Any

from mpass.config.sparse_config import SparseConfig
from mpass.errors import ConfigMismatchError


def check_model(config: SparseConfig, model: Any) -> None:
    """Hold a config against the sizes in `model.config`, as transformers keeps them.

    Raises ConfigMismatchError. A model without sizes, or with several sets of layers (an encoder
    and a decoder), is not checked: its attentions are, when they are compiled.
    """
    sizes = getattr(model, "config", None)
    text_sizes = getattr(sizes, "get_text_config", None)
    if text_sizes is not None and not getattr(sizes, "is_encoder_decoder", False):
        sizes = text_sizes()
    num_layers = getattr(sizes, "num_hidden_layers", None)
    if not isinstance(num_layers, int) or getattr(sizes, "is_encoder_decoder", False):
        return
    if config.num_layers is not None:
        config.check_num_layers(num_layers)
    beyond = [str(span) for span, _ in config.layers if span.first >= num_layers]
    if beyond:
        raise ConfigMismatchError(
            f"the config names layers {', '.join(beyond)}, the model has {num_layers} (0 to "
            f"{num_layers - 1}); use a config made for this model"
        )
    num_heads = getattr(sizes, "num_attention_heads", None)
    if isinstance(num_heads, int):
        for layer in range(num_layers):
            config.layer(layer).check_heads(num_heads, None, f"layer {layer}")
