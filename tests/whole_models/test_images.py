"""Models whose images see themselves: causal attention but within an image, or within a prefix.

transformers builds such masks from token_type_ids, whose values no proof knows: they are read at
run time. What stands outside of the images is sparse, and every token is as in eager attention.
"""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.lowering.recorder import record
from tests.helpers.toys import EVERY_KEY
from tests.whole_models.test_prompts_in_parts import OPTIONS, SIZES, tokens

transformers = pytest.importorskip("transformers", reason="builds models of transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

N = 160
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def gemma3():
    torch.manual_seed(0)
    text = {
        "sliding_window": 48,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = transformers.Gemma3Config(
        text_config=SIZES | text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config)
    return model.eval().requires_grad_(False)


def paligemma():
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(
        text_config=SIZES | {"model_type": "gemma", "head_dim": 16},
        vision_config=VISION,
        image_token_index=5,
    )
    model = transformers.PaliGemmaForConditionalGeneration._from_config(config)
    return model.eval().requires_grad_(False)


def types(*images: tuple[int, int], outside: int = 0, within: int = 1) -> torch.Tensor:
    """token_type_ids [1, N] with images from one position to another."""
    made = torch.full((1, N), outside)
    for start, stop in images:
        made[:, start:stop] = within
    return made


GEMMA = {
    "text alone": types(),
    "an image": types((10, 40)),
    "two images, one longer than the window": types((0, 20), (50, 110)),
}


def test_prompts_with_images_are_sparse_outside_of_them():
    """One graph serves every prompt; its text is sparse, its images dense."""
    plain, model = gemma3(), gemma3()
    model.forward = torch.compile(model.forward, backend="minference", options=OPTIONS)
    text = tokens(N, 4).clamp(min=9)
    ones = torch.ones_like(text)
    padded = ones.clone()
    padded[:, :9] = 0
    for name, kinds in GEMMA.items():
        for mask in (ones, padded):
            given = {"attention_mask": mask, "token_type_ids": kinds}
            with record() as log:
                out = model(text, **given).logits
            expected = plain(text, **given).logits
            seen = mask[0].bool()
            torch.testing.assert_close(out[:, seen], expected[:, seen], atol=1e-4, rtol=1e-4)
            ran = {layer: [c.lowering for c in log.calls if c.layer == layer] for layer in (0, 1)}
            images = int((kinds.diff() > 0).sum()) + int(kinds[0, 0])
            assert ran == {layer: ["cpu"] + ["dense"] * images for layer in (0, 1)}, name
    assert "2 decided at run time" in mpass.last_report().summary()


def test_a_prefix_that_sees_itself():
    """PaliGemma's prefix; a pattern that is causal leaves it dense, one that is not does not."""
    plain = paligemma()
    text = tokens(N, 5).clamp(min=9)
    given = {
        "attention_mask": torch.ones_like(text),
        "token_type_ids": types((0, 130), outside=1, within=0),
    }
    expected = plain(text, **given).logits
    patterns = {EVERY_KEY: ["cpu", "dense"], mpass.BlockSparse(1 << 20): ["cpu", "cpu"]}
    for pattern, lowerings in patterns.items():
        torch._dynamo.reset()
        model = paligemma()
        options = OPTIONS | {"pattern": pattern}
        model.forward = torch.compile(model.forward, backend="minference", options=options)
        with record() as log:
            out = model(text, **given).logits
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        assert [call.lowering for call in log.calls] == lowerings * 2
