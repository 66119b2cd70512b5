"""What the user asked for, and what becomes of each layer: a plan, or the reason to stay dense.

Settings come from vLLM's `additional_config={"minference": {...}}`, with the keys of SETTINGS. What
they leave open is taken from `minference.json` beside the model, then from the built-in default.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mpass.config.json_format import FORMAT, VERSION
from mpass.config.layer import LayerConfig
from mpass.config.model_check import check_model
from mpass.config.promise import promised_share
from mpass.config.spans import in_spans
from mpass.config.sparse_config import SparseConfig, builtin_default
from mpass.errors import ConfigMismatchError, EngineSettingError, OptionValueError
from mpass.lowering.crossover import LeastLengths
from mpass.lowering.dispatch import device_lowering, reason_against
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.options import check_values
from mpass.patterns.base import Pattern
from mpass.patterns.base.work import layer_work
from mpass.plan import FEWEST_QUERIES, MAX_HEAD_DIM
from mpass.resolve import SHIPPED, load_shipped, resolve_heads

KEY = "minference"
"""Of vLLM's additional_config."""

ALWAYS = LeastLengths(0, 0)

SETTINGS = ("enabled", "pattern", "config", "max_loss", "min_seq_len", "dense_above", "record")


@dataclass(frozen=True)
class Settings:
    """What applies to a model.

    given: the config or the pattern of the settings; shipped: the config beside the model, if there
    is one; given_by, shipped_by: where they come from, in words.
    max_loss: as of the backend's option: it comes before what is shipped; None if not said.
    min_seq_len: keys from which prefills are sparse, before what a config says; None if not said.
    dense_above: as of the backend's option. record: whether densities are counted.
    """

    given: SparseConfig = field(default_factory=SparseConfig)
    given_by: str = ""
    shipped: SparseConfig | None = None
    shipped_by: str = ""
    max_loss: float | None = None
    min_seq_len: int | None = None
    dense_above: float = 0.6
    enabled: bool = True
    record: bool = False

    @property
    def configs(self) -> list[SparseConfig]:
        """All configs, the first word first."""
        return [self.given] if self.shipped is None else [self.given, self.shipped]


def read_settings(additional_config: object, model: str) -> Settings:
    """Check what the user gave, and read what comes with the model.

    additional_config: vLLM's, of which only the value of "minference" is looked at.
    model: the model's folder; a name on a hub has no config beside it.

    Raises EngineSettingError for an unknown key, OptionValueError, UnknownPatternError and
    ConfigFileError.
    """
    own = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    given: dict[str, Any] = dict(checked_mapping(own))
    for key in given:
        if key not in SETTINGS:
            raise EngineSettingError(key, f"additional_config[{KEY!r}]", SETTINGS)
    flags = {name: given.pop(name, name == "enabled") for name in ("enabled", "record")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise OptionValueError(name, flag, "true or false")
    if isinstance(given.get("config"), Mapping | list):
        given["config"] = inline_config(given["config"])
    values = check_values(given)
    path = Path(model) / SHIPPED
    shipped = None
    if model and path.is_file() and values.get("max_loss") is None:
        status = path.stat()
        shipped = load_shipped(path, status.st_mtime_ns, status.st_size)
    return Settings(
        given=values.get("config") or SparseConfig(default=values.get("pattern")),
        given_by=values["config_source"].replace("options", f"additional_config[{KEY!r}]"),
        shipped=shipped,
        shipped_by="" if shipped is None else str(path),
        max_loss=values.get("max_loss"),
        min_seq_len=values.get("min_seq_len"),
        dense_above=values.get("dense_above", 0.6),
        **flags,
    )


def inline_config(config: Mapping[str, Any] | list[Any]) -> SparseConfig:
    """A config that stands in the settings, in any format of files; ours may leave out its name."""
    if isinstance(config, Mapping):
        config = {"format": FORMAT, "version": VERSION, **config}
    return SparseConfig.from_json(json.dumps(config))


def checked_mapping(own: object) -> Mapping[str, Any]:
    """The settings as a mapping; True and False stand for {"enabled": ...}."""
    if own is None:
        return {}
    if isinstance(own, bool):
        return {"enabled": own}
    if not isinstance(own, Mapping):
        raise OptionValueError(f"additional_config[{KEY!r}]", own, "a mapping of settings")
    return own


def check_settings(settings: Settings, model_config: object) -> None:
    """Hold the configs against the model's sizes, as its transformers config has them.

    Raises ConfigMismatchError, which names the config, where one was made for another model.
    """
    places = (settings.given_by, settings.shipped_by)
    for place, config in zip(places, settings.configs, strict=False):
        try:
            check_model(config, SimpleNamespace(config=model_config))
        except ConfigMismatchError as error:
            raise ConfigMismatchError(f"{place}: {error}") from error


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer of the engine.

    layer: its number in the model. num_heads, num_kv_heads: those of this rank; ranks: how many
    share the layer, this one being number `rank`. total_kv_heads: of the layer, None if unknown.
    num_layers: of the model; layers after these belong to a draft model. obstacle: why the engine's
    own attention must compute it, in words; "" if nothing speaks against ours.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    rank: int = 0
    ranks: int = 1
    total_kv_heads: int | None = None
    num_layers: int | None = None
    softcap: float = 0.0
    obstacle: str = ""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of a layer: sparse prefill with these patterns, one per query head of this rank.

    least: from how many keys and queries on. reason: why it stays with the engine; "" if it does
    not. source: which place named the patterns. most_lost: the share of a head's attention that a
    prefill may lose, where a loss is promised; 1 for all.
    """

    layer: int
    patterns: tuple[Pattern, ...] = ()
    least: LeastLengths = ALWAYS
    reason: str = ""
    source: str = ""
    most_lost: float = 1.0


def plan_layer(facts: LayerFacts, settings: Settings) -> LayerPlan:
    """Decide about a layer. Raises ConfigMismatchError if a config is for another model."""
    reason = reason_to_stay(facts, settings)
    if reason:
        return LayerPlan(facts.layer, reason=reason)
    for config in settings.configs:
        config.check_site(facts.layer, facts.num_heads * facts.ranks, facts.total_kv_heads)
    levels = [("", LayerConfig(min_seq_len=settings.min_seq_len))]
    levels.append((settings.given_by, settings.given.effective(facts.layer)))
    if settings.shipped is not None:
        levels.append((settings.shipped_by, settings.shipped.effective(facts.layer)))
    default = builtin_default(facts.device, max_loss=settings.max_loss)
    promised = f"additional_config[{KEY!r}]['max_loss'] = {settings.max_loss}"
    last = "the built-in default" if settings.max_loss is None else promised
    levels.append((last, LayerConfig(default)))
    first = facts.rank * facts.num_heads
    heads = list(range(first, first + facts.num_heads))
    resolved = resolve_heads(facts.layer, heads, levels)
    if all(pattern.name == "dense" for pattern in resolved.patterns):
        reason = "the config keeps every head dense"
        return LayerPlan(facts.layer, resolved.patterns, reason=reason, source=resolved.source)
    least = least_lengths(facts, settings, resolved.patterns, resolved.min_seq_len)
    most_lost = promised_share(resolved.patterns, settings.max_loss)
    return LayerPlan(
        facts.layer, resolved.patterns, least, source=resolved.source, most_lost=most_lost
    )


def reason_to_stay(facts: LayerFacts, settings: Settings) -> str:
    """Why a layer stays with the engine whatever its patterns, or ""."""
    if not settings.enabled:
        return "switched off"
    if facts.obstacle:
        return facts.obstacle
    if facts.num_layers is not None and facts.layer >= facts.num_layers:
        return "a layer of a draft model"
    if facts.head_dim > MAX_HEAD_DIM:
        return f"head_dim {facts.head_dim} is over {MAX_HEAD_DIM}"
    return unserved(facts.dtype, facts.device, facts.head_dim, facts.softcap > 0)


@functools.lru_cache(maxsize=64)
def unserved(dtype: torch.dtype, device: str, head_dim: int, softcap: bool) -> str:
    """Why no kernel serves such an attention so that it could pay, or ""."""
    block = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    inputs = AttentionInputs(block, block, block, AttentionMask(), 1.0, float(softcap))
    return reason_against(inputs)


def least_lengths(
    facts: LayerFacts, settings: Settings, patterns: Sequence[Pattern], keys: int | None
) -> LeastLengths:
    """From how many keys and queries on a layer is sparse, as the backend decides it.

    keys: what is configured, None if nothing is.
    """
    lowering = device_lowering(facts.device)
    if keys is None and lowering.least_lengths is not None and settings.dense_above < 1.0:
        work = layer_work(
            patterns,
            dtype=facts.dtype,
            head_dim=facts.head_dim,
            value_dim=facts.head_dim,
            kv_heads=facts.num_kv_heads,
        )
        return lowering.least_lengths(work, torch.device(facts.device))
    keys = lowering.shortest_prompt if keys is None else keys
    return LeastLengths(keys, min(FEWEST_QUERIES, keys))


def describe(plans: Sequence[LayerPlan], engine: str = "vLLM's") -> str:
    """What becomes of the layers, for the log: `layers 0-27 are sparse from 2048 keys on: ...`.

    engine: whose the others are.
    """
    sparse: dict[tuple[str, int, str], list[int]] = {}
    dense: dict[str, list[int]] = {}
    for plan in plans:
        if plan.reason:
            dense.setdefault(plan.reason, []).append(plan.layer)
        else:
            names = ", ".join(dict.fromkeys(str(pattern) for pattern in plan.patterns))
            sparse.setdefault((names, plan.least.keys, plan.source), []).append(plan.layer)
    lines = [
        f"layers {in_spans(sorted(set(layers)))} are sparse from {keys} keys on: {names} ({source})"
        for (names, keys, source), layers in sparse.items()
    ]
    lines += [
        f"layers {in_spans(sorted(set(layers)))} are {engine} own: {reason}"
        for reason, layers in dense.items()
    ]
    return "; ".join(lines) or "no layers"
