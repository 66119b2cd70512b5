"""Tiny transformers of diffusers, one per architecture, with the call of one denoising step.

Latents have 256 tokens or a little more, or that times a square, text 40. Where a model has a mask
for its text, some of it is padding. diffusers is imported when the first one is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpass.errors import MissingPackageError

TEXT, REAL = 40, 25
"""Tokens of a text, and how many of them are no padding."""

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}


@dataclass(frozen=True)
class DiffusionModel:
    """architecture: name of the class in diffusers. sizes: what its constructor is given. call:
    keyword arguments of one call.
    """

    architecture: str
    sizes: dict[str, Any]
    call: Callable[[], dict[str, Any]]

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, in eval mode, fp32, without gradients.

        Raises MissingPackageError without diffusers.
        """
        try:
            import diffusers
        except ImportError:
            raise MissingPackageError("diffusers", "pip install 'mpass[diffusion]'") from None
        torch.manual_seed(seed)
        model: nn.Module = getattr(diffusers, self.architecture)(**self.sizes)
        return model.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    """Random numbers, the same in each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def padded(dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of a text [1, TEXT], 1 for what is real."""
    return (torch.arange(TEXT) < REAL)[None].to(dtype)


def text_step(
    latents: tuple[int, ...], width: int, /, *, mask: torch.dtype | None = None, **more: Any
) -> dict[str, Any]:
    """A call with latents, a time and a text, as most models have it."""
    call = {
        "hidden_states": noise(*latents),
        "encoder_hidden_states": noise(1, TEXT, width),
        "timestep": torch.tensor([5.0]),
        **more,
    }
    return call | ({} if mask is None else {"encoder_attention_mask": padded(mask)})


def places(side: int) -> Tensor:
    """Positions [side * side, 3] of an image's tokens: its number, row and column."""
    line = torch.arange(float(side))
    row, column = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([row * 0, row, column], -1).flatten(0, 1)


def models(side: int = 1) -> dict[str, DiffusionModel]:
    """The models by a short name. side: factor of the latents' sides, so of tokens its square."""
    image = (1, 4, 32 * side, 32 * side)
    video = (1, 4, 2, 24 * side, 24 * side)
    return {
        "dit": DiffusionModel(
            "DiTTransformer2DModel",
            {
                **HEADS,
                "in_channels": 4,
                "out_channels": 8,
                "sample_size": 32 * side,
                "patch_size": 2,
            }
            | {"norm_num_groups": 1},
            lambda: {
                "hidden_states": noise(*image),
                "timestep": torch.tensor([5]),
                "class_labels": torch.tensor([3]),
            },
        ),
        "pixart": DiffusionModel(
            "PixArtTransformer2DModel",
            {**HEADS, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 64}
            | {
                "sample_size": 32 * side,
                "patch_size": 2,
                "caption_channels": 32,
                "norm_num_groups": 1,
            }
            | {"use_additional_conditions": False},
            lambda: text_step(
                image,
                32,
                mask=torch.float32,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ),
        ),
        "sd3": DiffusionModel(
            "SD3Transformer2DModel",
            {
                **HEADS,
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 32 * side,
                "patch_size": 2,
            }
            | {"joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 32}
            | {
                "pos_embed_max_size": 32 * side,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
            },
            lambda: text_step(image, 32, pooled_projections=noise(1, 32)),
        ),
        "flux": DiffusionModel(
            "FluxTransformer2DModel",
            {**HEADS, "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
            | {
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (8, 12, 12),
            },
            lambda: text_step(
                (1, 256 * side**2, 16),
                32,
                pooled_projections=noise(1, 32),
                img_ids=places(16 * side),
                txt_ids=torch.zeros(TEXT, 3),
            ),
        ),
        "auraflow": DiffusionModel(
            "AuraFlowTransformer2DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 32,
                "sample_size": 32 * side,
                "patch_size": 2,
            }
            | {
                "in_channels": 4,
                "out_channels": 4,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
            }
            | {
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pos_embed_max_size": 256 * side**2,
            },
            lambda: text_step(image, 32),
        ),
        "cogview3plus": DiffusionModel(
            "CogView3PlusTransformer2DModel",
            {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": 32}
            | {
                "time_embed_dim": 32,
                "condition_dim": 8,
                "pos_embed_max_size": 32 * side,
                "sample_size": 32 * side,
            },
            lambda: text_step(
                image,
                32,
                original_size=torch.tensor([[256.0, 256.0]]),
                target_size=torch.tensor([[256.0, 256.0]]),
                crop_coords=torch.tensor([[0.0, 0.0]]),
            ),
        ),
        "cogvideox": DiffusionModel(
            "CogVideoXTransformer3DModel",
            {
                **HEADS,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 8,
                "text_embed_dim": 16,
            }
            | {
                "sample_width": 24 * side,
                "sample_height": 24 * side,
                "sample_frames": 5,
                "patch_size": 2,
            }
            | {"temporal_compression_ratio": 4, "max_text_seq_length": TEXT},
            lambda: text_step((1, 2, 4, 24 * side, 24 * side), 16),
        ),
        "hunyuanvideo": DiffusionModel(
            "HunyuanVideoTransformer3DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
            | {"num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True}
            | {"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)},
            lambda: text_step(
                video,
                16,
                mask=torch.int64,
                pooled_projections=noise(1, 8),
                guidance=torch.tensor([6.0]),
            ),
        ),
        "wan": DiffusionModel(
            "WanTransformer3DModel",
            {**HEADS, "patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 16}
            | {"freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 64},
            lambda: text_step(video, 16),
        ),
        "ltx": DiffusionModel(
            "LTXVideoTransformer3DModel",
            {**HEADS, "in_channels": 8, "out_channels": 8, "patch_size": 1, "patch_size_t": 1}
            | {"cross_attention_dim": 64, "caption_channels": 16},
            lambda: text_step(
                (1, 288 * side**2, 8),
                16,
                mask=torch.float32,
                num_frames=2,
                height=12 * side,
                width=12 * side,
                rope_interpolation_scale=(1.0, 1.0, 1.0),
            ),
        ),
        "allegro": DiffusionModel(
            "AllegroTransformer3DModel",
            {**HEADS, "attention_head_dim": 48, "in_channels": 4, "out_channels": 4}
            | {
                "cross_attention_dim": 96,
                "sample_width": 24 * side,
                "sample_height": 24 * side,
                "sample_frames": 2,
            }
            | {"caption_channels": 24},
            lambda: text_step(
                video, 24, mask=torch.float32, attention_mask=torch.ones(1, 2, 24 * side, 24 * side)
            ),
        ),
        "mochi": DiffusionModel(
            "MochiTransformer3DModel",
            {**HEADS, "patch_size": 2, "pooled_projection_dim": 16, "in_channels": 4}
            | {"text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": TEXT}
            | {"activation_fn": "swiglu"},
            lambda: text_step(video, 16, mask=torch.bool),
        ),
        "sana": DiffusionModel(
            "SanaTransformer2DModel",
            {
                **HEADS,
                "patch_size": 1,
                "in_channels": 4,
                "out_channels": 4,
                "sample_size": 16 * side,
            }
            | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32}
            | {"cross_attention_dim": 64, "caption_channels": 16, "mlp_ratio": 2.0},
            lambda: text_step((1, 4, 16 * side, 16 * side), 16, mask=torch.float32),
        ),
        "qwenimage": DiffusionModel(
            "QwenImageTransformer2DModel",
            {**HEADS, "patch_size": 2, "in_channels": 16, "out_channels": 4}
            | {"joint_attention_dim": 16, "axes_dims_rope": (8, 12, 12)},
            lambda: text_step(
                (1, 256 * side**2, 16),
                16,
                encoder_hidden_states_mask=padded(torch.int64),
                img_shapes=[(1, 16 * side, 16 * side)],
            ),
        ),
        "lumina2": DiffusionModel(
            "Lumina2Transformer2DModel",
            {
                "sample_size": 32 * side,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 64,
                "num_layers": 2,
            }
            | {"num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
            | {"multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (128, 64, 64)}
            | {"cap_feat_dim": 32},
            lambda: text_step(image, 32, mask=torch.bool),
        ),
        "stable_audio": DiffusionModel(
            "StableAudioDiTModel",
            {"sample_size": 256 * side**2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
            | {
                "attention_head_dim": 32,
                "num_attention_heads": 4,
                "num_key_value_attention_heads": 2,
            }
            | {"cross_attention_dim": 16, "time_proj_dim": 16, "global_states_input_dim": 16}
            | {"cross_attention_input_dim": 16},
            lambda: text_step(
                (1, 4, 256 * side**2),
                16,
                global_hidden_states=noise(1, 1, 16),
                rotary_embedding=turns(256 * side**2 + 1, 16),
            ),
        ),
        "unet": DiffusionModel(
            "UNet2DConditionModel",
            {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16 * side}
            | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32}
            | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
            | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
            | {"attention_head_dim": 2, "norm_num_groups": 8},
            lambda: {
                "sample": noise(1, 4, 16 * side, 16 * side),
                "timestep": torch.tensor(5),
                "encoder_hidden_states": noise(1, TEXT, 32),
            },
        ),
        "autoencoder": DiffusionModel(
            "AutoencoderKL",
            {"block_out_channels": (32,), "latent_channels": 4, "norm_num_groups": 8}
            | {
                "down_block_types": ("DownEncoderBlock2D",),
                "up_block_types": ("UpDecoderBlock2D",),
            },
            lambda: {"sample": noise(1, 3, 16 * side, 16 * side)},
        ),
        "flux2": DiffusionModel(
            "Flux2Transformer2DModel",
            {**HEADS, "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
            | {"joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8, 8)},
            lambda: text_step(
                (1, 256 * side**2, 16),
                32,
                img_ids=nn.functional.pad(places(16 * side), (0, 1)),
                txt_ids=torch.zeros(TEXT, 4),
                guidance=torch.tensor([4.0]),
            ),
        ),
        "hunyuandit": DiffusionModel(
            "HunyuanDiT2DModel",
            {
                **HEADS,
                "in_channels": 4,
                "patch_size": 2,
                "sample_size": 32 * side,
                "hidden_size": 64,
            }
            | {"mlp_ratio": 2.0, "cross_attention_dim": 32, "cross_attention_dim_t5": 32}
            | {"pooled_projection_dim": 16, "text_len": TEXT, "text_len_t5": TEXT},
            lambda: text_step(
                image,
                32,
                text_embedding_mask=padded(),
                encoder_hidden_states_t5=noise(1, TEXT, 32),
                text_embedding_mask_t5=padded(),
                image_meta_size=torch.tensor([[256.0, 256.0, 256.0, 256.0, 0.0, 0.0]]),
                style=torch.tensor([0]),
                image_rotary_emb=turns(256 * side**2, 32),
            ),
        ),
    }


def turns(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, width] of rotary positions."""
    rate = 100.0 ** -torch.linspace(0, 1, width // 2)
    angle = torch.arange(float(tokens))[:, None] * rate.repeat(2)
    return angle.cos(), angle.sin()
