"""`attn_implementation="minference"` for transformers: no mask is built at all.

Opt-in, for models and calls whose mask cannot be proven or should not cost its memory:

    mpass.register_attention()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="minference")
    model.compile(backend="minference")

`describe_mask` stands in for transformers' mask functions and says in words what they would build;
`attention_forward` reads these words, and nothing else, for the mask. Words are a tensor whose
*shape* tells the rule, so that they survive whatever a model does with masks on the way:

    None               every key for a bidirectional module, else causal
    [B, Nk]            bidirectional, with the padding
    [B, 1 + W, Nk]     causal, with the padding and a sliding window of W keys (0 for none);
                       sizes of 1 instead of B and Nk where nothing is padded

Causal words mean that the last query stands at the last key. Whatever is not so (static caches, a
chunk in the middle), or has no words (chunks, image blocks, packed sequences seen outside of
compilation, 4-D masks of the user), gets its mask built as `sdpa` does. Where the op cannot serve
(gradients, dropout, a bias), plain torch computes the same attention, differentiably. The caller
promises one thing that no compiled graph can see: sequences are not packed by position ids alone,
without an attention mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpass.config.sparse_config import SparseConfig
from mpass.errors import ArgumentError, MaskShapeError, MissingPackageError
from mpass.patterns.base import Pattern

NAME = "minference"

CAUSAL = "causal_mask_function"
FULL = "bidirectional_mask_function"
JOINED = "and_masks.<locals>.and_mask"
"""transformers' mask functions that may need no cells; blocks of image tokens are an `or_mask`."""


def register_attention(
    *,
    paged: bool = False,
    pattern: Pattern | str | None = None,
    config: SparseConfig | str | Path | None = None,
    min_seq_len: int | None = None,
    dense_above: float | None = None,
) -> None:
    """Register the attention and its mask under the name "minference" with transformers.

    paged: also serve the packed requests of continuous batching (`generate_batch`, `transformers
        serve`) on CPUs, in models of attn_implementation="sdpa". What is registered under this name
        hands everything else on to transformers' own function.
    pattern, config, min_seq_len, dense_above: as the options of the backend, for paged attention.
        What they leave open is said by the `minference.json` beside a model, then by the built-in
        default. A later call with paged=True replaces them.

    Raises MissingPackageError if transformers is not installed, and OptionValueError,
    UnknownPatternError and ConfigFileError for what paged attention cannot take. ArgumentError is
    raised where it is given and paged is False: the options of the compile count there.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise MissingPackageError("transformers", "pip install 'mpass[models]'") from error

    import mpass.lowering.ops  # noqa: F401  (defines minference::attention)

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, describe_mask)
    given: dict[str, Any] = {
        "pattern": pattern,
        "config": config,
        "min_seq_len": min_seq_len,
        "dense_above": dense_above,
    }
    if paged:
        from mpass.serving.packed_attention import register_packed_attention

        register_packed_attention(**given)
        return
    for name, setting in given.items():
        if setting is not None:
            raise ArgumentError(name, setting, "None without paged=True: the compile has options")


def describe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> Tensor | None:
    """What `attention_forward` gets for a mask: words (see the module), or sdpa's own 4-D mask.

    The signature and its names are those of transformers' mask functions.
    """
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask  # generate() asks for masks before the model asks again
    rule = rule_in_words(settings)
    stop = kv_offset + kv_length
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == stop
    known = attention_mask is None or attention_mask.shape[-1] >= stop
    if rule is not None and known and (aligned or not rule.causal):
        padding = None if attention_mask is None else attention_mask[:, kv_offset:stop].bool()
        return words(rule, padding, settings.get("device", "cpu"))
    from transformers.masking_utils import sdpa_mask

    # None would be read as words, so the mask is built even where sdpa could do without.
    settings |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
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


@dataclass(frozen=True, slots=True)
class Rule:
    """A mask without its padding: causal or not, and the sliding window in keys (0 for none)."""

    causal: bool
    window: int = 0


def rule_in_words(settings: dict[str, Any]) -> Rule | None:
    """The rule of a mask function if it is causal, causal with a window, or full; else None.

    settings: what transformers passes on to a mask function, beside lengths and padding.
    """
    mask_function = settings.get("mask_function")
    code = getattr(mask_function, "__code__", None)
    name = "causal_mask_function" if mask_function is None else getattr(code, "co_qualname", "")
    if settings.get("use_vmap", False) or name not in (CAUSAL, FULL, JOINED):
        return None
    local_size, config = settings.get("local_size"), settings.get("config")
    if "allow_is_bidirectional_skip" in settings:
        return Rule(causal=False) if name == FULL and local_size is None else None
    # Compiling, positions made inside of the model look packed to transformers; the caller has
    # promised that they are not. Not compiling, transformers has looked at them.
    if not torch.compiler.is_compiling() and not settings.get("allow_is_causal_skip", True):
        return None
    if name == FULL:
        return None
    if local_size is None:
        return Rule(causal=True) if name == CAUSAL or torch.compiler.is_compiling() else None
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    return Rule(causal=True, window=local_size) if local_size == window != chunk else None


def words(rule: Rule, padding: Tensor | None, device: torch.device | str) -> Tensor | None:
    """A rule and its padding (bool [B, Nk], True for real keys) as a tensor that holds one copy."""
    if not rule.causal:
        return padding
    if padding is None and rule.window == 0:
        return None
    if padding is None:
        padding = torch.ones(1, 1, dtype=torch.bool, device=device)
    return padding[:, None].expand(-1, 1 + rule.window, -1)


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
    """One attention of a transformers model: query [B, H, Nq, D] -> ([B, Nq, H, Dv], None).

    Raises MaskShapeError for words about another number of keys.
    """
    causal, window, padding = read_words(module, attention_mask, key.shape[2], settings)
    offset = key.shape[2] - query.shape[2] if causal else 0
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks, softcap = settings.get("s_aux"), settings.get("softcap") or 0.0
    built = attention_mask is not None and attention_mask.dim() == 4
    bias, cache = settings.get("position_bias"), settings.get("cache")
    if not (built or dropout > 0 or bias is not None or cache is not None) and not needs_gradient(
        query, key, value, sinks
    ):
        out = torch.ops.minference.attention.default(
            query, key, value, padding, sinks, offset, window, causal, scale, softcap
        )
        return out.transpose(1, 2).contiguous(), None
    if not built and not (attention_mask is None and cache is not None):
        attention_mask = cells(query, key, causal, window, padding)
    if sinks is None and softcap == 0:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        settings.pop("softcap", None)
        served: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scale, dropout=dropout, **settings
        )
        return served
    out = attend_in_full(query, key, value, attention_mask, bias, sinks, scale, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


def read_words(
    module: nn.Module, mask: Tensor | None, num_keys: int, settings: dict[str, Any]
) -> tuple[bool, int, Tensor | None]:
    """Causality, window and padding [B, Nk] of what `describe_mask` gave; of a 4-D mask: nothing.

    Raises MaskShapeError for words about another number of keys.
    """
    if mask is None:
        causal = settings.get("is_causal")
        return bool(getattr(module, "is_causal", True) if causal is None else causal), 0, None
    if mask.dim() == 4:
        return False, 0, None
    told = mask.shape[-1]
    causal = mask.dim() == 3
    window = mask.shape[1] - 1 if causal else 0
    if causal and told == 1 and mask.shape[0] == 1 and num_keys != 1:
        return True, window, None
    if told != num_keys:
        raise MaskShapeError(getattr(module, "layer_idx", -1), tuple(mask.shape), num_keys)
    return causal, window, mask[:, 0] if causal else mask.bool()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def cells(
    query: Tensor, key: Tensor, causal: bool, window: int, padding: Tensor | None
) -> Tensor | None:
    """The mask that words stand for, bool [B or 1, 1, Nq, Nk]; None where every key is seen."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    seen = None if padding is None else padding[:, None, None, :]
    if not causal:
        return seen
    positions = torch.arange(num_queries, device=query.device) + (num_keys - num_queries)
    distance = positions[:, None] - torch.arange(num_keys, device=query.device)
    visible = distance >= 0
    if window > 0:
        visible = visible & (distance < window)
    return visible[None, None] if seen is None else visible & seen


def attend_in_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention written out, for what no fused kernel knows: sinks, softcap. Differentiable.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> [B, H, Nq, Dv]; mask: 4-D,
    bool or added to the scores; bias: added too; sinks [H]: a logit per head that takes part in the
    softmax and has no value.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        logits = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout, training=dropout > 0) @ value
