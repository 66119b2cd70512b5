"""`mode=` and `options=` of torch.compile: our keys, Inductor's keys, and an error for the rest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpass.config import SparseConfig, as_pattern
from mpass.errors import OptionValueError, UnknownOptionError
from mpass.patterns.base import Pattern

INNER_BACKENDS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """What a compile was asked for.

    pattern: one pattern for every head, an object or its name; exclusive with config.
    config: a SparseConfig, a pattern per layer and head.
    min_seq_len: prompts shorter than this stay dense; tokens.
    dense_above: share of the dense work above which the op runs dense attention instead.
    inner_backend: what compiles the rewritten graph.
    debug: write what became of every graph into this folder; True for ./mpass_debug.
    inductor: options passed on to Inductor.
    """

    pattern: Pattern | None = None
    config: SparseConfig | None = None
    min_seq_len: int = 2048
    dense_above: float = 0.6
    inner_backend: str = "inductor"
    debug: bool | str | os.PathLike[str] = False
    inductor: tuple[tuple[str, Any], ...] = ()

    @property
    def sparse_config(self) -> SparseConfig:
        """The config that applies where no decorator does."""
        return self.config or SparseConfig(default=self.pattern)

    @property
    def shortest(self) -> int:
        """The length from which prompts become sparse; the config's own value wins."""
        own = self.sparse_config.min_seq_len
        return self.min_seq_len if own is None else own


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Check and split what torch.compile passes on.

    Raises UnknownOptionError for a key that neither we nor Inductor have, OptionValueError for a
    value that a key cannot take, UnknownPatternError for a pattern that is not registered.
    """
    import torch._inductor
    from torch._inductor import config as inductor_config

    own = {field.name for field in dataclasses.fields(Options)} - {"inductor"}
    given = dict(options or {})
    values: dict[str, Any] = {key: given.pop(key) for key in own & set(given)}

    known = inductor_config.get_config_copy()
    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        modes = torch._inductor.list_mode_options()
        if mode not in modes:
            raise OptionValueError("mode", mode, ", ".join(sorted(modes)))
        patches.update(modes[mode])
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UnknownOptionError(key, [*own, *known])
        default = known[name]
        if default is not None and type(value) is not type(default) and not callable(value):
            raise OptionValueError(key, value, f"a {type(default).__name__}, as Inductor has it")
        patches[name] = value

    parsed = Options(**check_values(values), inductor=tuple(sorted(patches.items())))
    if parsed.inductor and parsed.inner_backend != "inductor":
        raise OptionValueError(
            "inner_backend", parsed.inner_backend, "'inductor' when Inductor's options are given"
        )
    return parsed


def check_values(values: dict[str, Any]) -> dict[str, Any]:
    """Our own keys with patterns resolved; raises OptionValueError naming the key at fault."""
    if values.get("pattern") is not None:
        if values.get("config") is not None:
            raise OptionValueError("pattern", values["pattern"], "not together with 'config'")
        values["pattern"] = as_pattern(values["pattern"])
    config = values.get("config")
    if config is not None and not isinstance(config, SparseConfig):
        raise OptionValueError("config", config, "a SparseConfig")
    length = values.get("min_seq_len", 0)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise OptionValueError("min_seq_len", length, "a number of tokens, 0 or more")
    share = values.get("dense_above", 0.6)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share:
        raise OptionValueError("dense_above", share, "a share of the dense work, 0 or more")
    if "dense_above" in values:
        values["dense_above"] = float(share)
    debug = values.get("debug", False)
    if not isinstance(debug, bool | str | os.PathLike):
        raise OptionValueError("debug", debug, "True, False or a folder")
    inner = values.get("inner_backend", "inductor")
    if inner not in INNER_BACKENDS:
        raise OptionValueError("inner_backend", inner, ", ".join(INNER_BACKENDS))
    return values
