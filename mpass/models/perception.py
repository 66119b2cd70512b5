"""Tiny encoders of pictures and of sound in transformers, with calls of 256 tokens or many more.

transformers' mappings for text have none of them. transformers is imported when one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SOUND: dict[str, Any] = {
    **SIZES,
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


@dataclass(frozen=True)
class Encoder:
    """architecture, config: names of transformers' classes. sizes: of the config. call: keyword
    arguments of one call. part: of the model, "" for all of it.
    """

    architecture: str
    config: str
    sizes: dict[str, Any]
    call: Callable[[], dict[str, Any]]
    part: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, in eval mode, fp32, without gradients."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.sizes)
        model: nn.Module = getattr(transformers, self.architecture)(config)
        if self.part:
            model = model.get_submodule(self.part)
        return model.float().eval().requires_grad_(False)


def numbers(*shape: int) -> Tensor:
    """Random numbers, the same in each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def of_pictures(name: str, side: int, **more: Any) -> Encoder:
    """A plain vision transformer whose config is named as the model."""
    sizes = {**SIZES, "image_size": 64 * side, "patch_size": 4, **more}
    return Encoder(f"{name}Model", f"{name}Config", sizes, lambda: picture(side))


def picture(side: int) -> dict[str, Any]:
    """One picture of 16 * side patches in either direction."""
    return {"pixel_values": numbers(1, 3, 64 * side, 64 * side)}


def of_sound(name: str, side: int, **more: Any) -> Encoder:
    """An encoder of raw sound whose config is named as the model; a frame is 20 samples."""
    call = {"input_values": numbers(1, 5200 * side**2)}
    return Encoder(f"{name}Model", f"{name}Config", {**SOUND, **more}, lambda: call)


def encoders(side: int = 1) -> dict[str, Encoder]:
    """The encoders by a short name. side: factor of a picture's sides, so of tokens its square."""
    return {
        "vit": of_pictures("ViT", side),
        "deit": of_pictures("DeiT", side),
        "beit": of_pictures("Beit", side, use_mask_token=False),
        "dinov2": of_pictures("Dinov2", side),
        "dinov2_with_registers": of_pictures("Dinov2WithRegisters", side, num_register_tokens=4),
        "dinov3_vit": of_pictures("DINOv3ViT", side, num_register_tokens=4),
        "ijepa": of_pictures("IJepa", side),
        "vit_msn": of_pictures("ViTMSN", side),
        "vit_mae": Encoder(
            "ViTMAEModel",
            "ViTMAEConfig",
            {**SIZES, "image_size": 64 * side, "patch_size": 4, "mask_ratio": 0.0},
            lambda: (
                picture(side) | {"noise": numbers(1, 256 * side**2)}
            ),  # the order of its patches
        ),
        "clip_vision": of_pictures("CLIPVision", side, projection_dim=32),
        "siglip_vision": of_pictures("SiglipVision", side),
        "blip_vision": of_pictures("BlipVision", side),
        "intern_vit": of_pictures(
            "InternVLVision", side, image_size=(64 * side, 64 * side), patch_size=(4, 4)
        ),
        "yolos": of_pictures(
            "Yolos", side, image_size=[64 * side, 64 * side], num_detection_tokens=4
        ),
        "swin": Encoder(
            "SwinModel",
            "SwinConfig",
            {
                "image_size": 64 * side,
                "patch_size": 4,
                "embed_dim": 32,
                "depths": [2],
                "num_heads": [2],
            }
            | {"window_size": 8},
            lambda: picture(side),
        ),
        "whisper_encoder": Encoder(
            "WhisperModel",
            "WhisperConfig",
            {"d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
            | {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
            | {
                "num_mel_bins": 16,
                "max_source_positions": 256 * side**2,
                "vocab_size": 64,
                "pad_token_id": 0,
            }
            | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
            lambda: {"input_features": numbers(1, 16, 512 * side**2)},
            part="encoder",
        ),
        "wav2vec2": of_sound("Wav2Vec2", side),
        "hubert": of_sound("Hubert", side),
        "wavlm": of_sound("WavLM", side),
        "data2vec_audio": of_sound("Data2VecAudio", side, conv_pos_kernel_size=3),
        "unispeech_sat": of_sound("UniSpeechSat", side),
        "sew": of_sound("SEW", side, squeeze_factor=1),
        "audio_spectrogram": Encoder(
            "ASTModel",
            "ASTConfig",
            {
                **SIZES,
                "patch_size": 4,
                "frequency_stride": 4,
                "time_stride": 4,
                "max_length": 64 * side,
            }
            | {"num_mel_bins": 64 * side},
            lambda: {"input_values": numbers(1, 64 * side, 64 * side)},
        ),
        "videomae": Encoder(
            "VideoMAEModel",
            "VideoMAEConfig",
            {**SIZES, "image_size": 32 * side, "patch_size": 4, "num_frames": 8, "tubelet_size": 2},
            lambda: {"pixel_values": numbers(1, 8, 3, 32 * side, 32 * side)},
        ),
        "vivit": Encoder(
            "VivitModel",
            "VivitConfig",
            {**SIZES, "image_size": 32 * side, "num_frames": 8, "tubelet_size": [2, 4, 4]},
            lambda: {"pixel_values": numbers(1, 8, 3, 32 * side, 32 * side)},
        ),
    }
