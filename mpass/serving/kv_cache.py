"""Cutting a cache of transformers to what a prompt's last queries chose: `mpass.compress`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mpass.errors import KVCacheError, MissingPackageError
from mpass.lowering.kv_selection import KVSelection
from mpass.serving.kv_positions import Rotation, rotations


def compress(cache: Any, selection: KVSelection, *, compact: Any | None = None) -> Any:
    """Cut a DynamicCache, in place, to the keys of a selection, and return it.

    cache: of the forward pass that was listened to, before anything is added to it. Sliding layers
        stay as they are. What is kept keeps its place: later tokens get the positions that they
        would have after the whole prompt.
    selection: of `mpass.select_keys`. A budget of all keys or more cuts nothing.
    compact: the model, compiled or not. Its kept keys then move together, up to the last of them,
        which keeps its place, and are turned by the model's rotary positions for that (FINCH). A
        few tokens are run to prove how each layer turns its keys. One position per token is taken
        for granted, in the order of the cache.

    Raises MissingPackageError without transformers, and KVCacheError, before anything is cut, for
    another kind of cache, for one of another length or batch, for a layer that selected nothing,
    for batch rows that have fewer real keys than the budget, and for keys that are to move and are
    not turned by rotary positions alone.
    """
    cut_class = cut_layer_class()
    kept = {
        number: positions
        for number, layer in enumerate(cache.layers)
        if not layer.is_sliding and (positions := checked(number, layer, selection)) is not None
    }
    widths = sorted({positions.shape[-1] for positions in kept.values()})
    if len(widths) > 1:
        raise KVCacheError(min(kept), f"layers select {widths} keys; give all of them one budget")
    turns: dict[int, Rotation] = {}
    if compact is not None and kept:
        turns = proven_rotations(compact, kept, max(selection.length.values()))
    for number, positions in kept.items():
        cut = cut_class.of(cache.layers[number], positions)
        if number in turns:
            last = positions[..., -1:]
            steps = torch.arange(1 - positions.shape[-1], 1, device=positions.device)
            cut.keys = turns[number].turn(cut.keys, last + steps - positions)
        cache.layers[number] = cut
    return cache


def proven_rotations(model: Any, kept: dict[int, torch.Tensor], length: int) -> dict[int, Rotation]:
    """How the layers that are cut turn their keys; raises KVCacheError where that is not proven."""
    found = rotations(model, length)
    proven = {}
    for number in kept:
        rotation = found[number] if number < len(found) else None
        if rotation is None:
            raise KVCacheError(
                number,
                "its keys do not move by one rotation per position (learned, biased or dynamic "
                "positions, or another model); leave out `compact`",
            )
        proven[number] = rotation
    return proven


def checked(number: int, layer: Any, selection: KVSelection) -> torch.Tensor | None:
    """The positions that a layer is to be cut to, None for all; raises KVCacheError."""
    from transformers.cache_utils import DynamicLayer

    if type(layer) is not DynamicLayer:
        name = type(layer).__name__
        raise KVCacheError(number, f"it is a {name}; a DynamicCache is needed, cut at most once")
    positions = selection.positions.get(number)
    if positions is None:
        raise KVCacheError(
            number,
            "it selected nothing: its attention is not sparse, or nobody listened; "
            "mpass.last_report() says why",
        )
    length = layer.get_seq_length()
    if length != selection.length[number]:
        raise KVCacheError(
            number, f"it has {length} keys, the selection is of {selection.length[number]}"
        )
    if positions.shape[-1] >= length:
        return None
    own = layer.keys
    assert own is not None, "a layer that has a length has keys"
    if positions.shape[:2] != own.shape[:2]:
        shapes = f"{tuple(own.shape[:2])}, the selection of {tuple(positions.shape[:2])}"
        raise KVCacheError(number, f"its batch and heads are {shapes}")
    if bool((positions < 0).any()):
        raise KVCacheError(
            number, "a batch row has fewer real keys than the budget; batch prompts of like length"
        )
    return positions


@functools.cache
def cut_layer_class() -> Any:
    """A layer of a cache of transformers that lacks keys of its prompt."""
    try:
        from transformers.cache_utils import DynamicLayer
    except ImportError as error:
        raise MissingPackageError("transformers", "pip install 'mpass[models]'") from error

    class CutLayer(DynamicLayer):
        """A DynamicLayer that tells the length that it would have uncut.

        Position ids follow that length; masks are made for the keys that are there.
        """

        cut, kept = 0, 0  # keys that were taken out, and left in

        @classmethod
        def of(cls, layer: Any, positions: torch.Tensor) -> CutLayer:
            """The layer with the keys at `positions` [B, Hk, K] alone."""
            own = cls()
            own.lazy_initialization(layer.keys, layer.values)
            for name in ("keys", "values"):
                whole = getattr(layer, name)
                index = positions.to(whole.device, torch.int64)[..., None]
                setattr(own, name, whole.gather(2, index.expand(-1, -1, -1, whole.shape[-1])))
            own.kept = positions.shape[-1]
            own.cut = layer.keys.shape[-2] - own.kept
            return own

        def get_seq_length(self) -> int:
            length: int = super().get_seq_length()
            return length + self.cut if length else 0

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return super().get_seq_length() + query_length, self.cut

        def crop(self, tokens_to_remove: int) -> None:
            if abs(tokens_to_remove) > super().get_seq_length() - self.kept:
                raise KVCacheError(-1, "tokens of a prompt that was cut cannot be removed")
            super().crop(tokens_to_remove)

        def reset(self) -> None:
            super().reset()
            self.cut = self.kept = 0

    return CutLayer
