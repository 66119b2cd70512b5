"""Cutting a cache of transformers to what a prompt's last queries chose: `mpass.compress`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from mpass.errors import KVCacheError, MissingPackageError
from mpass.lowering.kv_selection import KVSelection


def compress(cache: Any, selection: KVSelection) -> Any:
    """Cut a DynamicCache, in place, to the keys of a selection, and return it.

    cache: of the forward pass that was listened to, before anything is added to it. Sliding layers
        stay as they are. What is kept keeps its place: later tokens get the positions that they
        would have after the whole prompt.
    selection: of `mpass.select_keys`. A budget of all keys or more cuts nothing.

    Raises MissingPackageError without transformers, and KVCacheError, before anything is cut, for
    another kind of cache, for one of another length or batch, for a layer that selected nothing,
    and for batch rows that have fewer real keys than the budget.
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
    for number, positions in kept.items():
        cache.layers[number] = cut_class.of(cache.layers[number], positions)
    return cache


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
