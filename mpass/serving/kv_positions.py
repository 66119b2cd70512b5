"""How a model's layers turn their keys by rotary positions, proven on the model itself.

Moving a cached key to another place multiplies it by a rotation. Which one is no property of a
cache, and a model's code spells it in many ways (halves or neighbours, part of the channels, one
base per kind of layer, none). So candidates are made of the frequencies that the model holds, and
each layer is asked: a prompt of one token attends to itself alone, so that its keys differ between
positions by their rotation and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.errors import KVCacheError

TOKENS = 4
"""Tokens by which a rotation is tried."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer turns its keys.

    frequencies: radians per position [R], none for a layer without rotary positions.
    first, second: channels of a head that are turned as pairs, int64 [R] each.
    """

    frequencies: Tensor
    first: Tensor
    second: Tensor

    def turn(self, keys: Tensor, by: Tensor) -> Tensor:
        """Keys [B, Hk, K, D] as they were `by` positions on, integers that broadcast [B, Hk, K]."""
        # fp64, since thousands of radians in fp32 are only good to a thousandth.
        angle = by.to(keys.device, torch.float64)[..., None] * self.frequencies
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = keys[..., self.first].float(), keys[..., self.second].float()
        out = keys.clone()
        out[..., self.first] = (a * cos - b * sin).to(keys.dtype)
        out[..., self.second] = (b * cos + a * sin).to(keys.dtype)
        # What does not move keeps its bits.
        return torch.where((by == 0).to(keys.device)[..., None], keys, out)


def rotations(model: Any, length: int) -> list[Rotation | None]:
    """The rotation of each layer of a model of transformers; None where no candidate is right.

    model: compiled or not; a few tokens are run through it, eagerly. length: of the prompt whose
        keys are to be moved; frequencies that depend on it, as in dynamic scaling, are none.

    Raises KVCacheError for a model that cannot be asked.
    """
    config = getattr(model, "config", None)
    if "mrope_section" in str(getattr(config, "rope_parameters", "")):
        raise KVCacheError(-1, "the model's tokens have more than one position each")
    places = (0, 1, max(1, length // 3), max(1, length - 1))
    try:
        # Small positions are asked again alone, after which the model is as a short prompt leaves
        # it: dynamic frequencies are then others.
        far, near = keys_of(model, places), keys_of(model, places[:2])
    except Exception as error:
        problem = f"the model does not run one token at a position ({type(error).__name__}: {error}"
        raise KVCacheError(-1, problem[:300] + ")") from error
    frequencies = list(frequencies_of(model))
    return [
        find_rotation(one, other, places, frequencies) for one, other in zip(far, near, strict=True)
    ]


def keys_of(model: Any, places: tuple[int, ...]) -> list[Tensor]:
    """Per layer the keys [TOKENS, places, Hk, D] of single tokens at each of some positions."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, embedding.num_embeddings, (TOKENS, 1), generator=generator)
    ids = tokens.expand(-1, len(places)).reshape(-1, 1).to(embedding.weight.device)
    position_ids = torch.tensor(places).repeat(TOKENS)[:, None].to(ids.device)
    # Nothing is compiled for this: the same model may be called in any of its forms.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        cache = model(ids, position_ids=position_ids, use_cache=True).past_key_values
    return [layer.keys.unflatten(0, (TOKENS, len(places))).squeeze(3) for layer in cache.layers]


def frequencies_of(model: Any) -> Iterator[Tensor]:
    """The tables of rotary frequencies that a model holds, each once."""
    seen: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or buffer.dim() != 1:
            continue
        own = buffer.double()
        if not any(own.shape == other.shape and torch.equal(own, other) for other in seen):
            seen.append(own)
            yield own


def candidates(
    frequencies: list[Tensor], head_dim: int, device: torch.device
) -> Iterator[Rotation]:
    """What a layer may do: nothing, or turn halves or neighbours, of the first or last channels."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    yield Rotation(none.double(), none, none)
    for own in frequencies:
        count = own.shape[0]
        for start in sorted({0, head_dim - 2 * count}):
            if start < 0 or 2 * count > head_dim:
                continue
            steps = start + torch.arange(count, device=device)
            yield Rotation(own.to(device), steps, steps + count)
            evens = start + 2 * torch.arange(count, device=device)
            yield Rotation(own.to(device), evens, evens + 1)


def find_rotation(
    far: Tensor, near: Tensor, places: tuple[int, ...], frequencies: list[Tensor]
) -> Rotation | None:
    """The candidate that makes a layer's keys at each position of those at the first one.

    far, near: of `keys_of`, at `places` and at the first of these.
    """
    size = far[:, 0].float().norm()
    # Rounding of the keys, and of the angles that the model itself computes in fp32.
    allowed = size * (2 * torch.finfo(far.dtype).eps + max(places) * 2.0**-23)
    if (far[:, : near.shape[1]].float() - near.float()).norm() > allowed:
        return None
    first = far[:, 0]  # [TOKENS, Hk, D]
    steps = torch.tensor(places)
    for rotation in candidates(frequencies, far.shape[-1], far.device):
        turned = rotation.turn(first[:, :, None].expand(-1, -1, len(places), -1), steps)
        errors = (turned.transpose(1, 2).float() - far.float()).flatten(2).norm(dim=(0, 2))
        if bool((errors <= allowed).all()):
            return rotation
    return None
