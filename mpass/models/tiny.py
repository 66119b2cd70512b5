"""Tiny randomly initialised models of the families that mpass is meant for, built from config.

Two layers, hidden size 64, vocabulary 128. Nothing is downloaded. This module and its users need
transformers; the pass does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
WINDOW = 16
"""Sliding window (and attention chunk) of the families that have one: shorter than the prompts."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WITH_FLEX = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class Family:
    """A model family: its config class and sizes, the kind of its inputs.

    kind: "decoder" (causal language model), "text" (a decoder without a head), "encoder", "image",
    "encoder_decoder" or "speech". model: `module:class` where no auto class makes it.
    implementations: attention spellings that transformers has for it and that run on a CPU:
    flex_attention of llama4 (chunks) and gpt_oss (sinks) does not, compiled by Inductor either.
    """

    name: str
    config: str
    sizes: dict[str, Any]
    kind: str = "decoder"
    model: str = ""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    static_cache: bool = True


def decoder(name: str, config: str, sizes: dict[str, Any] | None = None, **more: Any) -> Family:
    """A causal language model."""
    extra = {k: more.pop(k) for k in list(more) if k not in Family.__dataclass_fields__}
    return Family(name, config, {**(GQA if sizes is None else sizes), **extra}, **more)


FAMILIES: tuple[Family, ...] = (
    decoder("llama", "LlamaConfig", implementations=WITH_FLEX),
    decoder("yi", "LlamaConfig", rope_theta=5e6, num_key_value_heads=1, implementations=WITH_FLEX),
    decoder(
        "llama4",
        "Llama4TextConfig",
        intermediate_size_mlp=96,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    decoder("qwen2", "Qwen2Config", implementations=WITH_FLEX),
    decoder("qwen3", "Qwen3Config", head_dim=16, implementations=WITH_FLEX),
    decoder(
        "qwen3_moe", "Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
        implementations=WITH_FLEX,
    ),
    decoder(
        "qwen3_next",
        "Qwen3NextConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    decoder(
        "qwen2_5_vl_text",
        "Qwen2_5_VLTextConfig",
        kind="text",
        model="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLTextModel",
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    ),
    decoder("mistral", "MistralConfig", sliding_window=WINDOW, implementations=WITH_FLEX),
    decoder(
        "mixtral", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2,
        implementations=WITH_FLEX,
    ),
    decoder("phi3", "Phi3Config", implementations=WITH_FLEX),
    decoder("glm4", "Glm4Config", head_dim=16, implementations=WITH_FLEX),
    decoder(
        "gemma2", "Gemma2Config", head_dim=16, sliding_window=WINDOW,
        implementations=("eager", "flex_attention"),
    ),
    decoder(
        "gemma3", "Gemma3TextConfig", head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        implementations=WITH_FLEX,
    ),
    decoder(
        "gpt_oss",
        "GptOssConfig",
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        implementations=("eager",),
    ),
    decoder(
        "cohere2", "Cohere2Config", sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        implementations=WITH_FLEX,
    ),
    decoder("falcon", "FalconConfig", SIZES, new_decoder_architecture=True, num_kv_heads=2),
    decoder("falcon_mq", "FalconConfig", SIZES, multi_query=True, new_decoder_architecture=False),
    decoder("gpt_neox", "GPTNeoXConfig", SIZES, implementations=WITH_FLEX),
    decoder("gpt2", "GPT2Config", SIZES),
    decoder(
        "opt", "OPTConfig", SIZES, ffn_dim=96, word_embed_proj_dim=64, implementations=WITH_FLEX
    ),
    decoder("bloom", "BloomConfig", SIZES, implementations=("eager",), static_cache=False),
    decoder(
        "deepseek_v3",
        "DeepseekV3Config",
        {**SIZES, "num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        implementations=WITH_FLEX,
    ),
    decoder("granite", "GraniteConfig", implementations=WITH_FLEX),
    decoder("olmo2", "Olmo2Config", implementations=WITH_FLEX),
    decoder("starcoder2", "Starcoder2Config", sliding_window=None, implementations=WITH_FLEX),
    Family(
        "bert", "BertConfig", SIZES, kind="encoder", implementations=WITH_FLEX, static_cache=False
    ),
    Family(
        "vit",
        "ViTConfig",
        {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        | {"num_attention_heads": 4, "image_size": 32, "patch_size": 4},
        kind="image",
        static_cache=False,
    ),
    Family(
        "t5",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2,
         "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2},
        kind="encoder_decoder",
        static_cache=False,
    ),
    Family(
        "whisper",
        "WhisperConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
         "decoder_ffn_dim": 96, "max_source_positions": 50, "max_target_positions": 128,
         "num_mel_bins": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
        kind="speech",
        static_cache=False,
    ),
)  # fmt: skip

BY_NAME = {family.name: family for family in FAMILIES}

AUTO = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "image": "AutoModel",
    "encoder_decoder": "AutoModel",
    "speech": "AutoModel",
}


def build(family: Family, implementation: str = "sdpa", seed: int = 0) -> nn.Module:
    """A tiny model of a family in eval mode, fp32, without gradients."""
    import transformers

    torch.manual_seed(seed)
    config_class = getattr(transformers, family.config, None) or config_by_module(family)
    config: Any = config_class(**family.sizes)
    config._attn_implementation = implementation
    if family.model:
        module, _, name = family.model.partition(":")
        model = getattr(__import__(module, fromlist=[name]), name)(config)
    else:
        model = getattr(transformers, AUTO[family.kind]).from_config(
            config, attn_implementation=implementation
        )
    return model.eval().requires_grad_(False)


def config_by_module(family: Family) -> Callable[..., Any]:
    """A config class that transformers does not export at its top level."""
    module = family.model.partition(":")[0].replace("modeling_", "configuration_")
    return getattr(__import__(module, fromlist=[family.config]), family.config)


# -- scenarios --------------------------------------------------------------------------------

LENGTH = 37
CACHED = 20
CAPACITY = 64


@dataclass(frozen=True)
class Scenario:
    """One way to call a model.

    mask: None, "ones", "left" or "right" padding. cache: None, "dynamic" or "static". cached: how
    many tokens the cache holds before the call; new: how many the call brings.
    """

    name: str
    mask: str = ""
    cache: str = ""
    cached: int = 0
    new: int = LENGTH


SCENARIOS: tuple[Scenario, ...] = (
    Scenario("no_cache"),
    Scenario("no_cache_ones", mask="ones"),
    Scenario("no_cache_left", mask="left"),
    Scenario("no_cache_right", mask="right"),
    Scenario("dynamic_prefill", cache="dynamic"),
    Scenario("dynamic_prefill_left", cache="dynamic", mask="left"),
    Scenario("dynamic_prefill_right", cache="dynamic", mask="right"),
    Scenario("dynamic_chunk", cache="dynamic", cached=CACHED, new=LENGTH - CACHED),
    Scenario("dynamic_chunk_left", cache="dynamic", cached=CACHED, new=17, mask="left"),
    Scenario("dynamic_decode", cache="dynamic", cached=CACHED, new=1),
    Scenario("dynamic_decode_left", cache="dynamic", cached=CACHED, new=1, mask="left"),
    Scenario("static_prefill", cache="static"),
    Scenario("static_prefill_left", cache="static", mask="left"),
    Scenario("static_decode", cache="static", cached=CACHED, new=1),
    Scenario("static_chunk", cache="static", cached=CACHED, new=17),
)


def scenarios(family: Family) -> list[Scenario]:
    """The scenarios that a family has: caches belong to decoders."""
    if family.kind == "image":
        return [scenario for scenario in SCENARIOS if scenario.name == "no_cache"]
    if family.kind not in ("decoder", "text"):
        return [scenario for scenario in SCENARIOS if not scenario.cache]
    return [s for s in SCENARIOS if s.cache != "static" or family.static_cache]


def inputs(family: Family, model: nn.Module, scenario: Scenario, batch: int = 2) -> dict[str, Any]:
    """Keyword arguments of one call, with a cache that earlier tokens have filled."""
    generator = torch.Generator().manual_seed(1)
    total = scenario.cached + scenario.new
    ids = torch.randint(3, VOCABULARY, (batch, total), generator=generator)
    mask = padding(scenario.mask, batch, total)
    if family.kind == "image":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    call: dict[str, Any] = {"input_ids": ids}
    if mask is not None:
        call["attention_mask"] = mask
    if family.kind == "encoder":
        return call
    if family.kind == "encoder_decoder":
        decoder_mask = {} if mask is None else {"decoder_attention_mask": mask}
        return {**call, "decoder_input_ids": ids, "use_cache": False, **decoder_mask}
    if family.kind == "speech":
        features = torch.randn(batch, 16, 100, generator=generator)
        decoder_mask = {} if mask is None else {"decoder_attention_mask": mask}
        return {
            "input_features": features,
            "decoder_input_ids": ids,
            "use_cache": False,
            **decoder_mask,
        }
    return {**call, **cached_call(family, model, scenario, ids, mask)}


def padding(kind: str, batch: int, length: int) -> torch.Tensor | None:
    """An attention_mask [B, N] as a tokenizer makes it; the last row is padded by 5."""
    if not kind:
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    if kind == "left":
        mask[-1, :5] = 0
    if kind == "right":
        mask[-1, -5:] = 0
    return mask


def cached_call(
    family: Family,
    model: nn.Module,
    scenario: Scenario,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
) -> dict[str, Any]:
    """Arguments of a decoder's call: its cache after the first `cached` tokens, the new tokens."""
    if not scenario.cache:
        return {"use_cache": False}
    import transformers

    config: Any = model.config
    cache: Any
    if scenario.cache == "static":
        cache = transformers.StaticCache(config=config, max_cache_len=CAPACITY)
    else:
        cache = transformers.DynamicCache(config=config)
    if scenario.cached:
        before = {} if mask is None else {"attention_mask": mask[:, : scenario.cached]}
        with torch.no_grad():
            model(input_ids=ids[:, : scenario.cached], past_key_values=cache, **before)
    return {
        "input_ids": ids[:, scenario.cached :],
        "past_key_values": cache,
        "use_cache": True,
    }


def main_output(output: Any) -> torch.Tensor:
    """Logits of a model, or its last hidden state."""
    return output.logits if getattr(output, "logits", None) is not None else output[0]


def real_rows(family: Family, call: dict[str, Any]) -> torch.Tensor | None:
    """Which rows [B, N] of the main output belong to tokens that are no padding; None for all."""
    mask = call.get("decoder_attention_mask", call.get("attention_mask"))
    if mask is None or "pixel_values" in call:
        return None
    ids: Any = call.get("decoder_input_ids", call.get("input_ids"))
    new = ids.shape[1]
    return mask[:, -new:].bool()
