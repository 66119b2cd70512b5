"""Tiny models of every class in transformers' mappings, built from the config of each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpass.models.class_table import BUILT_BY_HAND, CHANGES, INPUTS
from mpass.models.diffusion import DiffusionModel, models
from mpass.models.perception import Encoder, encoders
from mpass.models.shrink import shrunk
from mpass.models.tiny import Family, Scenario, inputs, scenarios

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
"""Names of transformers' mappings from a model type to the class of a task."""


BY_HAND: dict[str, Callable[[int], Mapping[str, DiffusionModel | Encoder]]] = {
    "perception": encoders,
    "diffusion": models,
}
"""Kinds without a mapping: encoders of pictures and sound, and the transformers of diffusers.

Tables by a short name, for a factor of the sides of pictures."""

CALL, LONG = "call", "long"
"""Scenarios of these kinds: with full budgets; with default options at 2048 tokens and more."""

KINDS = (*MAPPINGS, *BY_HAND)
"""Every kind of class."""

TURNS = Scenario("turns", cache="dynamic", cached=37, new=23)
"""A prompt in two parts and a second question, through one compiled model: see `turns_of`."""

PLAIN = (
    "no_cache",
    "no_cache_left",
    "dynamic_prefill",
    "dynamic_chunk",
    "static_prefill",
    "static_chunk",
    TURNS.name,
)
"""How people run a long prompt: at once, padded, into a cache, in parts, and with a next turn."""


@dataclass(frozen=True)
class ModelClass:
    """One entry of a mapping.

    kind: "causal", "image-text", "encoder-decoder", "encoder" (of text), or one of BY_HAND.
    model_type: transformers' name of the config, or a name of the table of BY_HAND.
    architecture: name of the model's class.
    """

    kind: str
    model_type: str
    architecture: str

    @property
    def name(self) -> str:
        """A name that no other entry has."""
        return f"{self.kind}:{self.model_type}"


def model_classes(kinds: tuple[str, ...] = tuple(MAPPINGS)) -> list[ModelClass]:
    """All entries of the mappings, in their order, and those made by hand if asked for."""
    by_hand = [
        ModelClass(kind, name, model.architecture)
        for kind in kinds
        if kind in BY_HAND
        for name, model in BY_HAND[kind](1).items()
    ]
    if not set(kinds) & set(MAPPINGS):
        return by_hand
    from transformers.models.auto import modeling_auto

    return [
        ModelClass(kind, model_type, names if isinstance(names, str) else names[0])
        for kind in kinds
        if kind in MAPPINGS
        for model_type, names in getattr(modeling_auto, MAPPINGS[kind]).items()
    ] + by_hand


def tiny_config(entry: ModelClass) -> Any:
    """The config of a class, shrunk by the rules and by what the table says of it."""
    if entry.model_type in BUILT_BY_HAND:
        return BUILT_BY_HAND[entry.model_type]()
    config_class: Any = config_class_of(entry)
    small = shrunk(config_class().to_dict())
    changes = {**CHANGES.get(entry.model_type, {}), **CHANGES.get(entry.name, {})}
    for place, value in changes.items():
        put(small, place.split("."), value)
    if entry.kind == "causal" and "is_decoder" in small:
        small["is_decoder"] = True
    return config_class.from_dict(small)


def config_class_of(entry: ModelClass) -> Any:
    """The config of the class: of the model type, or of the part of it that the class is."""
    import transformers

    whole: Any = transformers.CONFIG_MAPPING[entry.model_type]
    own: Any = getattr(transformers, entry.architecture).config_class
    parts = getattr(whole, "sub_configs", {}).values()
    return own if own is not None and own in parts else whole


def put(config: dict[str, Any], place: list[str], value: Any) -> None:
    """Set a field of a part of a config."""
    for name in place[:-1]:
        config = config.setdefault(name, {})
    config[place[-1]] = value


def build_class(entry: ModelClass, seed: int = 0) -> nn.Module:
    """A tiny random model of a class, in eval mode, fp32, without gradients.

    Parameters that start as one number for all (gains, biases, tables of a bias) get some noise, so
    that leaving one out would be noticed.
    """
    import transformers

    torch.manual_seed(seed)
    architecture: Any = getattr(transformers, entry.architecture)
    model: nn.Module = architecture(tiny_config(entry)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


def family_of(entry: ModelClass, model: nn.Module) -> Family:
    """What the scenarios ask of a family, for a class: how its calls look."""
    config: Any = model.config
    kind = "encoder" if entry.kind == "encoder" else "decoder"
    kind = "encoder_decoder" if getattr(config, "is_encoder_decoder", False) else kind
    static = bool(getattr(model, "_can_compile_fullgraph", False))
    return Family(entry.name, type(config).__name__, {}, kind=kind, static_cache=static)


def scenarios_of(entry: ModelClass, model: nn.Module) -> list[Scenario]:
    """The plain scenarios of a class: without a cache where its calls need more than tokens."""
    family = family_of(entry, model)
    allowed = [s for s in scenarios(family) if s.name in PLAIN]
    allowed += [TURNS] * (family.kind == "decoder")
    return [s for s in allowed if not (s.cache and more_inputs(entry))]


def turns_of(entry: ModelClass, model: nn.Module) -> list[dict[str, Any]]:
    """Calls that follow each other on one cache: of 20, 17 and 23 tokens, for one batch row."""
    family = family_of(entry, model)
    first = inputs(family, model, Scenario("", cache="dynamic", new=TURNS.cached + TURNS.new), 1)
    parts = first["input_ids"].split((20, TURNS.cached - 20, TURNS.new), dim=1)
    return [{**first, "input_ids": part} for part in parts]


def more_inputs(entry: ModelClass) -> Callable[[Any, dict[str, Any]], dict[str, Any]] | None:
    """What makes the inputs that a class needs beside its tokens."""
    return INPUTS.get(entry.name) or INPUTS.get(entry.model_type)


def class_inputs(entry: ModelClass, model: nn.Module, scenario: Scenario) -> dict[str, Any]:
    """Keyword arguments of one call of a class."""
    call = inputs(family_of(entry, model), model, scenario)
    more = more_inputs(entry)
    if more is not None:
        call |= more(model.config, call)
    return {name: value for name, value in call.items() if value is not None}
