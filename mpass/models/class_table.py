"""What the rules of shrink.py cannot know of a class: fields to set, and inputs that it needs.

Each entry has its reason: a default that the class itself does not run with, a size that a class
derives in code, or an input without which a call is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SECTIONS = "text_config.rope_parameters.mrope_section"
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}

CHANGES: dict[str, dict[str, Any]] = {
    # sections of rotary positions that stand in the model's code and not in its config
    "glm46v": {SECTIONS: [4, 6, 6]},
    "glmga": {SECTIONS: [4, 6, 6]},
    "glm4v": {SECTIONS: [4, 6, 6]},
    "glm4v_moe": {SECTIONS: [1, 1, 1]},
    "glm_ocr": {SECTIONS: [2, 3, 3]},
    "paddleocr_vl": {SECTIONS: [4, 6, 6]},
    "qwen2_5_omni_thinker": {SECTIONS: [4, 6, 6]},
    "qwen2_5_vl": {SECTIONS: [4, 6, 6]},
    "qwen2_vl": {SECTIONS: [4, 6, 6]},
    "ernie4_5_vl_moe": {SECTIONS: [6, 6, 4]},
    # fields that the default config leaves empty, and the class reads
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**DEFAULT_ROPE, "mrope_section": [6, 5, 5]}}
    },
    "cohere_compass": {
        "text_config.rope_parameters": {
            "full_attention": {**DEFAULT_ROPE, "mrope_section": [6, 5, 5]}
        }
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 88},
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2,
        "text_config.moe_intermediate_size": 88,
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 48,
    },
    "dots1": {**EXPERTS, "num_local_experts": 4, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 512, "pad_token_id": 1, "mask_token_id": 2},
    "esmc": {"vocab_size": 512},
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "vision_config.hidden_size": 128,
        "vision_config.num_attention_heads": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 32},
    "hunyuan_v1_moe": {"head_dim": 32},
    "hunyuan_vl": {"text_config.head_dim": 32, SECTIONS: [4, 4, 4, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 32},
    "nemotron": {"num_key_value_heads": 12},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": 16},
    # sizes that do not divide
    "aya_vision": {"vision_config.num_attention_heads": 4},
    "stablelm": {"hidden_size": 256},
    # layers that share keys and values with earlier ones of their kind
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [256] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    # a vocabulary of image tokens
    "chameleon": {"vocabulary_map": {"<image>": 310}},
    "image-text:emu3": {"vocabulary_map": {"<image>": 310}},
    "xmod": {"default_language": "en_XX"},
}
"""Fields to set after the rules, by model type or by kind:type; a dot leads into a part."""
for _whole, _part in (("qwen4_exp", "qwen4_exp_text"),):
    CHANGES[f"image-text:{_whole}"] = {
        f"text_config.{name}": value for name, value in CHANGES[_part].items()
    }
    CHANGES[f"causal:{_whole}"] = CHANGES[_part]


def encoder_and_decoder() -> Any:
    """BERT as encoder and as decoder."""
    from transformers import BertConfig, EncoderDecoderConfig

    return EncoderDecoderConfig.from_encoder_decoder_configs(*bert_pair(BertConfig))


def image_and_decoder() -> Any:
    """ViT as encoder, BERT as decoder."""
    from transformers import BertConfig, VisionEncoderDecoderConfig, ViTConfig

    vision = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        image_size=32, patch_size=4,
    )  # fmt: skip
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, bert_pair(BertConfig)[1])


def bert_pair(config: Any) -> tuple[Any, Any]:
    """Configs of a small BERT that encodes and of one that decodes."""
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 512,
    }  # fmt: skip
    return config(**sizes), config(**sizes, is_decoder=True, add_cross_attention=True)


BUILT_BY_HAND: dict[str, Callable[[], Any]] = {
    "encoder-decoder": encoder_and_decoder,
    "vision-encoder-decoder": image_and_decoder,
}
"""Configs that are made of two others."""


def codebooks(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Tokens of each codebook, one row each."""
    return {"input_ids": call["input_ids"].repeat_interleave(config.num_codebooks, 0)}


def image(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """One image [B, 3, S, S] beside each prompt."""
    vision: Any = config
    for part in ("vision_config", "encoder"):
        vision = getattr(vision, part, vision)
    return {"pixel_values": noise(batch_of(call), 3, vision.image_size, vision.image_size)}


def noise(*shape: int) -> Tensor:
    """Random numbers, the same in each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def batch_of(call: dict[str, Any]) -> int:
    """The number of prompts of a call."""
    return int(call["input_ids"].shape[0])


def idefics(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """One image beside each prompt, which every token sees."""
    pixels = image(config, call)["pixel_values"]
    mask = torch.ones(*call["input_ids"].shape, 1, dtype=torch.int64)
    return {"pixel_values": pixels[:, None], "image_attention_mask": mask}


def kosmos(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Embeddings of an image, at the first tokens."""
    batch, length = call["input_ids"].shape
    count = min(8, length)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, :count] = True
    embeddings = noise(batch, count, config.text_config.embed_dim)
    return {"image_embeds": embeddings, "image_embeds_position_mask": mask}


def patches(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Patches of a page [B, 16, 2 + P], each with its row and column in front."""
    flat = noise(batch_of(call), 16, config.vision_config.patch_embed_hidden_size + 2)
    flat[:, :, :2] = (torch.arange(16)[:, None] // torch.tensor([4, 1]) % 4 + 1).float()
    return {"flattened_patches": flat, "input_ids": None, "attention_mask": None}


def page(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """An image in the place of the prompt."""
    return {**image(config, call), "input_ids": None, "attention_mask": None}


def boxes(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Where each token stands on its page, in shares of it."""
    corners = torch.linspace(0.0, 0.5, call["input_ids"].shape[1])[None, :, None]
    box = corners + torch.tensor([0.0, 0.0, 0.1, 0.1])
    return {"bbox": box.expand(batch_of(call), -1, 4).contiguous()}


def prefix(config: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Which tokens are of the prompt (0), as the processor says: those see each other.

    Without this transformers leaves the mask out of a model that runs eagerly, so that every token
    sees every other, and makes a causal one while it is compiled.
    """
    types = torch.ones_like(call["input_ids"])
    types[:, : types.shape[1] // 2] = 0
    return {"token_type_ids": types}


INPUTS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Any]]] = {
    "causal:musicgen": codebooks,
    "causal:musicgen_melody": codebooks,
    "blip": image,
    "idefics": idefics,
    "kosmos-2": kosmos,
    "paligemma": prefix,
    "pix2struct": patches,
    "pp_formulanet": page,
    "udop": boxes,
    "vision-encoder-decoder": page,
}
"""Inputs that a call needs beside its tokens; None takes one away. They run without a cache."""

NOT_BUILT = {
    "gemma4_assistant": "drafts tokens on the keys of another model",
    "gemma4_unified_assistant": "drafts tokens on the keys of another model",
    "voxtral_realtime": "hears audio in step with its tokens",
    "blip-2": "needs an image beside its tokens, with a token for each query of its Q-Former",
    "instructblip": "needs an image beside its tokens, with a token for each of its Q-Former",
    "instructblipvideo": "needs a video beside its tokens, with a token for each of its Q-Former",
    "pi0": "needs the state of a robot",
}
"""Classes that do not run by themselves, and why."""
