"""Makes a tiny config of any model of transformers from its default one, by rules on names.

Widths are divided by 16, and head counts and head sizes by 4 each, so that what was a product of
these stays one: a hidden size of 4096 with 32 heads of 128 becomes 256 with 8 heads of 32, and so
does every projection between parts of a model. One layer of each kind is kept. Vocabularies,
experts, windows and tables of positions become small; ids of tokens stay within the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 512
FIRST_SPECIAL = 300
"""Ids of special tokens start here, above the tokens of random prompts."""
WINDOW = 16
"""Windows, chunks and kept keys: shorter than the prompts, so that they hide something."""
POSITIONS = 2048
"""Longest table of positions."""

LEFT_OUT = frozenset(
    {"transformers_version", "id2label", "label2id", "dtype", "torch_dtype", "architectures"}
)
IDS = re.compile(r"(token|_id|_index|_idx)(_ids?|_index)?$|^image_patch_id$|_token_ids$")
NO_IDS = re.compile(r"insert_layer_id|lang_id|altup_active_idx|tokens?$|num_.*token")
VOCABULARIES = re.compile(r"vocab(_size)?(_per_layer_input|_base)?$|hash_byte_group_vocab$")
LAYERS = re.compile(
    r"(^|_)(num_hidden_layers|num_layers|n_layers?|depth|encoder_layers|decoder_layers|layers"
    r"|num_encoder_layers|num_decoder_layers|num_blocks|num_global_layers|num_layers_per_stack"
    r"|insert_layer_id)$"
)
NO_LAYERS = re.compile(r"residual_layers|adapter_layers|lstm_layers|shared_layers|^num_res_blocks$")
FIRST_LAYERS = re.compile(
    r"first_k_dense_replace|num_dense_layers|nextn_predict_layers|max_window_layers"
    r"|num_sparse_(en|de)coder_layers|add_layers$|mtp_num_hidden_layers"
)
PERIODS = re.compile(
    r"(layer_period|_interval|sparse_step|sliding_window_pattern|every_n_layers"
    r"|layer_group_size|interleave_moe_layer_step|layers_per_attn_res_block)$"
)
LAYER_LISTS = re.compile(
    r"(indexe?s|indices|idxs|layer_ids|(attention|target|source|scaling|only|moe)_layers"
    r"|^moe_layers)$"
)
HEADS = re.compile(
    r"(^|_)(attention_|key_value_|kv_|query_|num_|n_|mamba_)*heads?$|_heads_per_layer$"
    r"|num_(key|value)_heads$|query_groups$"
)
NO_HEADS = re.compile(r"chunk_size_lm_head|pooling|mm_")
HEAD_SIZES = re.compile(
    r"(head_dim|head_size|headdim|d_head|dim_head|head_width|d_kv|kv_channels|rotary_dim|query_pre_attn_scalar"
    r"|attention_head_size)$"
)
EXPERTS = re.compile(
    r"(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_experts|zero_expert_num)$"
)
CHOSEN_EXPERTS = re.compile(
    r"(num_experts_per_tok(en)?|moe_top_?k|moe_k|experts_top_k|top_k_experts)$"
)
EXPERT_GROUPS = re.compile(r"(^n_group|num_expert_group|topk_group)$")
WINDOWS = re.compile(
    r"(sliding_window|sliding_window_size|attention_chunk_size|local_attention|attention_window"
    r"|attention_window_size|keep_window_size|index_topk|local_attention_window_len"
    r"|swa_window_size|local_window_size)$"
)
PLACES = re.compile(
    r"(position|n_ctx|context_length|seq_len|max_length|model_max_length|n_positions|num_pos"
    r"|seq_length|max_num_patches|expert_capacity|max_.*_positions|clamp_len|mem_len)"
)
AS_THEY_ARE = re.compile(
    r"(image|patch|crop|tile|token|resolution|temporal|merge|stride|scale_factor|rate|chunk|bins"
    r"|theta|floor|window|kernel|upsampl|bucket|distance|downsample_factor|pos_emb_|num_query"
    r"|latent|codebook|num_embeddings|conv|seed|hop|length|block_size|multiple|per_ngram|divisible"
    r"|parts|hc_|state_size|_state|limit|max_.*_size|min_.*_size|channels|num_filters|base"
    r"|n_groups|summary|capacity|num_classes|_size_alignment|query_num|input_dim|n_latents"
    r"|pos_feats|scale$)"
)
WIDTHS = re.compile(r"(size|dim|width|rank|d_model|embd|d_ff|dff|dim_ff|d_inner|lora|hidden|d_ssm)")


@dataclass
class Numbers:
    """What is shared by all parts of a config: the new id of each special token.

    ids: from the id of a special token to the one that it gets.
    """

    ids: dict[int, int] = field(default_factory=dict)

    def token(self, old: int) -> int:
        """The new id of a special token; small ones are kept, where prompts do not use them."""
        if old < 3:
            return old
        return self.ids.setdefault(old, FIRST_SPECIAL + len(self.ids))


def shrunk(config: dict[str, Any], numbers: Numbers | None = None) -> dict[str, Any]:
    """A tiny config, as a dict, from the `to_dict()` of a large one.

    config: what a config of transformers holds, with those of its parts as dicts.
    numbers: ids that were given in the config around this one.
    """
    numbers = numbers or Numbers()
    layers = kept_layers(config)
    return {
        name: value_of(name, value, layers, numbers)
        for name, value in config.items()
        if name not in LEFT_OUT
    }


def kept_layers(config: dict[str, Any]) -> dict[int, int]:
    """The layers that are kept, as a dict from the old number to the new one.

    One of each kind is kept, as the lists that say something of each layer tell them apart, and
    at least two in all. The key -1 holds how many there were.
    """
    counts = [value for name, value in config.items() if isinstance(value, int) and is_layers(name)]
    total = max(counts, default=0)
    kinds: dict[tuple[Any, ...], int] = {}
    lists: list[Any] = [value for value in config.values() if is_kinds(value, total)]
    own = {int(layer): of for layer, of in (config.get("per_layer_config") or {}).items()}
    lists += [[own.get(layer) for layer in range(total)]] * bool(own)
    for layer in range(total):
        kinds.setdefault(tuple(str(values[layer]) for values in lists), layer)
    kept = sorted(kinds.values())[:6]
    more = [layer for layer in range(total) if layer not in kept]
    kept = sorted(kept + more[: max(0, 2 - len(kept))])
    return {-1: total, **{old: new for new, old in enumerate(kept)}}


def is_layers(name: str) -> bool:
    """Whether a field says how many layers there are."""
    others = NO_LAYERS.search(name) or FIRST_LAYERS.search(name)
    return bool(LAYERS.search(name)) and not others


def is_kinds(value: Any, total: int) -> bool:
    """Whether a list says of each layer which kind it is: by a word, or by yes and no."""
    if not isinstance(value, (list, tuple)) or len(value) != total or total < 2:
        return False
    return all(isinstance(v, (str, bool)) for v in value) or set(value) == {0, 1}


def value_of(name: str, value: Any, layers: dict[int, int], numbers: Numbers) -> Any:
    """The small value of a field."""
    if name == "per_layer_config" and value:
        return {
            layers[int(old)]: shrunk(of, numbers) for old, of in value.items() if int(old) in layers
        }
    if isinstance(value, dict):
        return shrunk(value, numbers) if all(isinstance(k, str) for k in value) else value
    if isinstance(value, (list, tuple)):
        return list_of(name, list(value), layers, numbers)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return number_of(name, value, layers, numbers)


def list_of(name: str, values: list[Any], layers: dict[int, int], numbers: Numbers) -> list[Any]:
    """The small value of a field that is a list: of layers, of their numbers, or of a width."""
    total = layers[-1]
    kept = [old for old in layers if old >= 0]
    if total > 1 and len(values) == total and not (LAYER_LISTS.search(name) and is_count(values)):
        return [value_of(name, values[old], layers, numbers) for old in kept]
    if LAYER_LISTS.search(name) and all(isinstance(v, int) for v in values):
        return sorted({layers[old] for old in values if old in layers}) or list(
            range(min(len(values), len(kept)))
        )
    if name == "mrope_section":
        return shares(values, sum(values) // 4)
    if name in ("long_factor", "short_factor"):
        return values[: len(values) // 4]
    if name == "vision_feature_layer":
        return [-1 - place for place in range(len(values))]
    return [value_of(name, value, layers, numbers) for value in values]


def is_count(values: list[Any]) -> bool:
    """Whether a list is of numbers of layers, in their order."""
    return all(isinstance(v, int) and not isinstance(v, bool) for v in values) and values == sorted(
        set(values)
    )


def shares(values: list[int], total: int) -> list[int]:
    """Whole numbers in the ratio of others, with a given sum; none becomes zero."""
    whole = sum(values)
    small = [max(1, value * total // whole) for value in values]
    for place in range(total - sum(small)):
        small[place % len(small)] += 1
    return small


def number_of(name: str, value: int, layers: dict[int, int], numbers: Numbers) -> int:
    """The small value of a field that is a number: the first rule whose name fits decides."""
    if value <= 0:
        return value
    for pattern, but, rule in RULES:
        if pattern.search(name) and not (but and but.search(name)):
            return rule(value, layers, numbers)
    return width(value) if value >= 512 else value


def width(value: int) -> int:
    """A width: a sixteenth, and 4 at least."""
    return value if value < 16 else max(4, value // 16)


def heads(value: int) -> int:
    """A number of heads: a quarter where that is whole, else half of it."""
    if value < 4:
        return value
    return value // 4 if value % 4 == 0 else value // 2 if value % 2 == 0 else value


Rule = Callable[[int, dict[int, int], Numbers], int]

RULES: tuple[tuple[re.Pattern[str], re.Pattern[str] | None, Rule], ...] = (
    (VOCABULARIES, None, lambda value, layers, numbers: min(value, VOCABULARY)),
    (FIRST_LAYERS, None, lambda value, layers, numbers: min(value, 1)),
    (PERIODS, None, lambda value, layers, numbers: min(value, 2)),
    (re.compile("layer_offset$"), None, lambda value, layers, numbers: min(value, 1)),
    (LAYERS, NO_LAYERS, lambda value, layers, numbers: min(value, max(2, len(layers) - 1))),
    (EXPERTS, None, lambda value, layers, numbers: min(value, 4)),
    (CHOSEN_EXPERTS, None, lambda value, layers, numbers: min(value, 2)),
    (EXPERT_GROUPS, None, lambda value, layers, numbers: 1),
    (WINDOWS, None, lambda value, layers, numbers: min(value, WINDOW)),
    (IDS, NO_IDS, lambda value, layers, numbers: numbers.token(value)),
    (HEADS, NO_HEADS, lambda value, layers, numbers: heads(value)),
    (HEAD_SIZES, None, lambda value, layers, numbers: max(4, value // 4)),
    (re.compile("(nope|rope|v|qk|no_rope)_head_dim$"), None,
     lambda value, layers, numbers: max(4, value // 4)),
    (PLACES, None, lambda value, layers, numbers: min(value, POSITIONS)),
    (AS_THEY_ARE, re.compile("intermediate_size|hidden|head|^d_|(conv|embed)_dim$"),
     lambda value, layers, numbers: value),
    (WIDTHS, None, lambda value, layers, numbers: width(value)),
)  # fmt: skip
"""Pattern of a field's name, names that it does not mean, and what becomes of the number."""
