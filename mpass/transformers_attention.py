"""`attn_implementation="minference"` for transformers: no mask is built at all.

Opt-in, for models and calls whose mask cannot be proven or should not cost its memory:

    mpass.register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="minference")
    model.forward = torch.compile(model.forward, backend="minference")

Every attention then calls the op `minference::attention` with its mask in words, which the pass
makes sparse as any other, and which is dense where nothing compiles it. What the words cannot say
(chunks, image blocks, packed sequences seen outside of compilation, 4-D masks of the user, static
caches) gets its mask built as `sdpa` does. The caller promises one thing that no compiled graph
can see: sequences are not packed by position ids alone, without an attention mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpass.errors import MissingPackageError

NAME = "minference"

PLAIN = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks.<locals>.and_mask",
)
"""transformers' mask functions that need no cells; blocks of image tokens are an `or_mask`."""


def register_attention() -> None:
    """Register the attention and its mask under the name "minference" with transformers.

    Raises MissingPackageError if transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise MissingPackageError("transformers", "pip install 'mpass[models]'") from error

    import mpass.lowering.ops  # noqa: F401  (defines minference::attention)

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe_mask)


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Tensor | None:
    """What `attention_forward` gets for a mask: None, the padding [B, Nk], or sdpa's own mask.

    Signature and names are those of transformers' mask functions.
    """
    from transformers.masking_utils import sdpa_mask

    in_words = not isinstance(q_offset, Tensor) and (
        attention_mask is None or attention_mask.shape[-1] >= kv_offset + kv_length
    )
    if in_words and is_plain(settings):
        if attention_mask is None:
            return None
        return attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    start: Any = q_offset  # static caches give a tensor, against sdpa_mask's own annotation
    built: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=start,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **settings,
    )
    return built


def is_plain(settings: dict[str, Any]) -> bool:
    """Whether the mask is causal, causal with a sliding window, or full, and padding on top."""
    mask_function = settings.get("mask_function")
    code = getattr(mask_function, "__code__", None)
    if settings.get("use_vmap", False) or code is None or code.co_qualname not in PLAIN:
        return False
    local_size = settings.get("local_size")
    window = getattr(settings.get("config"), "sliding_window", None)
    bidirectional = "allow_is_bidirectional_skip" in settings
    if local_size is not None and (bidirectional or local_size != window):
        return False
    # Compiling, positions made inside of the model look packed to transformers; the caller has
    # promised that they are not. Not compiling, it has looked at them.
    return torch.compiler.is_compiling() or bool(settings.get("allow_is_causal_skip", True))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """One attention of a transformers model: query [B, H, Nq, D] -> ([B, Nq, H, Dv], None)."""
    if needs_sdpa(attention_mask, dropout, query, settings):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        fallback: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return fallback(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **settings,
        )
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    out = torch.ops.minference.attention.default(
        query,
        key,
        value,
        attention_mask,
        settings.get("s_aux"),
        key.shape[2] - query.shape[2] if causal else 0,
        (settings.get("sliding_window") or 0) if causal else 0,
        bool(causal),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        settings.get("softcap") or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def needs_sdpa(
    attention_mask: Tensor | None, dropout: float, query: Tensor, settings: dict[str, Any]
) -> bool:
    """Whether a call says what the op cannot: a built mask, dropout, gradients, a position bias."""
    return (
        (attention_mask is not None and attention_mask.dim() == 4)
        or dropout > 0
        or (torch.is_grad_enabled() and query.requires_grad)
        or settings.get("position_bias") is not None
        or settings.get("cache") is not None
    )
