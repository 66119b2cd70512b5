"""Small programs of libraries beside transformers, each with random weights and one input.

They are what people run in these libraries: their default paths, and settings that spell attention
in another way. The libraries are imported when a program is built, and none is needed otherwise;
benchmarks/libraries.txt pins the versions that were tried.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 40
"""Length of a text. Pictures have 64 patches, and sometimes one class token."""
WORDS = 128


@dataclass(frozen=True)
class Program:
    """A module and a call of it.

    length: the number of queries, and of keys, of its self-attention; the batch and the numbers of
    layers do not matter.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    length: int = TOKENS
    keywords: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Library:
    """One library.

    name: as pip calls it; module: as Python does. programs: from a name to what builds it.
    """

    name: str
    module: str
    programs: dict[str, Callable[[], Program]]


def part(place: str) -> Any:
    """A function or class of a library, by `module:name`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def text() -> Tensor:
    """Two rows of tokens, int64 [2, N]."""
    return torch.randint(5, WORDS, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def picture() -> Tensor:
    """Two pictures [2, 3, 32, 32], of 64 patches of 4 x 4 pixels."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# -- torch's own modules ------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A module inside of one of the user's: torch compiles none of its own modules alone."""

    def __init__(self, inner: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.inner = inner
        self.keywords = keywords

    def forward(self, *inputs: Tensor) -> Any:
        """What the module gives."""
        return self.inner(*inputs, **self.keywords)


def torch_encoder() -> Program:
    """nn.TransformerEncoder, as it is."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    return Program(Wrapped(nn.TransformerEncoder(layer, 2)), (torch.randn(2, TOKENS, 64),))


def torch_causal() -> Program:
    """nn.TransformerEncoder as a language model: causal, with its mask."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    inner = Wrapped(nn.TransformerEncoder(layer, 2), mask=mask, is_causal=True)
    return Program(inner, (torch.randn(2, TOKENS, 64),))


def torch_decoder() -> Program:
    """nn.Transformer: encoder, decoder, and attention from one to the other."""
    inner = nn.Transformer(64, 4, 2, 2, 96, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    both = torch.randn(2, 2, TOKENS, 64).unbind(0)
    return Program(Wrapped(inner, tgt_mask=mask, tgt_is_causal=True), both)


# -- texts --------------------------------------------------------------------------------------


def x_transformers(kind: str = "Decoder", **settings: Any) -> Program:
    """x-transformers: a language model, or an encoder of text."""
    layers = part(f"x_transformers:{kind}")(dim=64, depth=2, heads=4, attn_dim_head=16, **settings)
    wrapper = part("x_transformers:TransformerWrapper")
    return Program(wrapper(num_tokens=WORDS, max_seq_len=64, attn_layers=layers), (text(),))


def local_transformer() -> Program:
    """local-attention: windows of 16 tokens."""
    build = part("local_attention:LocalTransformer")
    inner = build(
        num_tokens=WORDS, max_seq_len=64, dim=64, depth=2, heads=4, dim_head=16,
        local_attn_window_size=16, num_residual_streams=1,
    )  # fmt: skip
    return Program(inner, (text()[:, :32],), length=32)


def litgpt(cache: bool = False, **settings: Any) -> Program:
    """litgpt: a model by a config of its own; with a cache its mask comes from a buffer."""
    config = part("litgpt:Config")(
        block_size=64, n_layer=2, n_embd=64, n_head=4, n_query_groups=2, padded_vocab_size=WORDS,
        vocab_size=WORDS, rotary_percentage=1.0, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=96, parallel_residual=False, **settings,
    )  # fmt: skip
    inner = part("litgpt:GPT")(config)
    if not cache:
        return Program(inner, (text(),))
    inner.set_kv_cache(batch_size=2)
    return Program(inner, (text(), torch.arange(TOKENS)))


def torchtune(packed: bool = False) -> Program:
    """torchtune: a Llama; packed texts have a mask that is handed in."""
    inner = part("torchtune.models.llama3:llama3")(
        vocab_size=WORDS, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64, max_seq_len=64,
        intermediate_dim=96,
    )  # fmt: skip
    if not packed:
        return Program(inner, (text(),))
    start = torch.tensor([0] * 17 + [17] * (TOKENS - 17))
    same = start[:, None] == start[None]
    mask = (same & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()).expand(2, -1, -1)
    positions = (torch.arange(TOKENS) - start).expand(2, -1)
    return Program(inner, (text(),), keywords=(("mask", mask), ("input_pos", positions)))


class Logits(nn.Module):
    """The first of what a model gives by names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, N, vocabulary]."""
        logits: Tensor = self.inner(tokens)["logits"]
        return logits


def esm2() -> Program:
    """fair-esm: ESM-2, over the letters of a protein."""
    inner = part("esm.model.esm2:ESM2")(num_layers=2, embed_dim=64, attention_heads=4)
    return Program(Logits(inner), (text() % 20 + 4,))


# -- pictures -----------------------------------------------------------------------------------


def vit_pytorch(kind: str = "ViT", length: int = 65) -> Program:
    """vit-pytorch: an encoder of pictures."""
    inner = part(f"vit_pytorch:{kind}")(
        image_size=32, patch_size=4, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=96,
        dim_head=16,
    )  # fmt: skip
    return Program(inner, (picture(),), length)


def timm(fused: bool = True) -> Program:
    """timm: its vision transformer, by SDPA or written out."""
    inner = part("timm.models:VisionTransformer")(
        img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, num_classes=10
    )
    for block in inner.blocks:
        block.attn.fused_attn = fused
    return Program(inner, (picture(),), length=65)


def clip(sees: bool) -> Program:
    """open_clip: the encoder of pictures or that of text, of nn.MultiheadAttention."""
    vision = part("open_clip.model:CLIPVisionCfg")(
        layers=2, width=64, head_width=16, patch_size=4, image_size=32
    )
    words = part("open_clip.model:CLIPTextCfg")(
        context_length=TOKENS, vocab_size=WORDS, width=64, heads=4, layers=2
    )
    inner = part("open_clip.model:CLIP")(64, vision, words)
    if sees:
        return Program(inner.visual, (picture(),), length=65)
    return Program(Method(inner, "encode_text"), (text(),))


class Method(nn.Module):
    """One method of a module as a module."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner = inner
        self.name = name

    def forward(self, given: Tensor) -> Any:
        """What the method gives."""
        return getattr(self.inner, self.name)(given)


def segment_anything(**settings: Any) -> Program:
    """segment-anything: its encoder of pictures, over [B*H, N, D]."""
    inner = part("segment_anything.modeling.image_encoder:ImageEncoderViT")(
        img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, out_chans=16, **settings
    )
    return Program(inner, (picture(),), length=64)


LIBRARIES: tuple[Library, ...] = (
    Library(
        "torch",
        "torch",
        {"encoder": torch_encoder, "causal": torch_causal, "both": torch_decoder},
    ),
    Library(
        "x-transformers",
        "x_transformers",
        {
            "decoder": x_transformers,
            "decoder, flash": lambda: x_transformers(attn_flash=True),
            "decoder, one kv head": lambda: x_transformers(attn_one_kv_head=True),
            "decoder, grouped": lambda: x_transformers(attn_kv_heads=2),
            "decoder, ALiBi": lambda: x_transformers(alibi_pos_bias=True),
            "decoder, T5": lambda: x_transformers(rel_pos_bias=True),
            "decoder, rotary": lambda: x_transformers(rotary_pos_emb=True),
            "decoder, talking heads": lambda: x_transformers(attn_pre_talking_heads=True),
            "encoder": lambda: x_transformers("Encoder"),
        },
    ),
    Library("local-attention", "local_attention", {"windows": local_transformer}),
    Library(
        "litgpt",
        "litgpt",
        {
            "plain": litgpt,
            "cache": lambda: litgpt(cache=True),
            "softcap": lambda: litgpt(attention_logit_softcapping=30.0),
            "window": lambda: litgpt(sliding_window_size=16),
        },
    ),
    Library("torchtune", "torchtune", {"plain": torchtune, "packed": lambda: torchtune(True)}),
    Library("fair-esm", "esm", {"esm2": esm2}),
    Library(
        "vit-pytorch",
        "vit_pytorch",
        {"ViT": vit_pytorch, "SimpleViT": lambda: vit_pytorch("SimpleViT", 64)},
    ),
    Library("timm", "timm", {"fused": timm, "written out": lambda: timm(fused=False)}),
    Library(
        "open_clip_torch", "open_clip", {"picture": lambda: clip(True), "text": lambda: clip(False)}
    ),
    Library(
        "segment-anything",
        "segment_anything",
        {
            "plain": segment_anything,
            "relative": lambda: segment_anything(use_rel_pos=True, rel_pos_zero_init=False),
        },
    ),
)
"""The libraries that are tried, and the programs of each."""
