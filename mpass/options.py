"""`mode=` and `options=` of torch.compile: our keys, Inductor's keys, and an error for the rest."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpass.config.layer import as_pattern, check_length
from mpass.config.presets import PRESETS, with_preset
from mpass.config.promise import LEAST, MOST
from mpass.config.sparse_config import SparseConfig
from mpass.errors import OptionValueError, UnknownOptionError, UnknownPatternError
from mpass.lowering.device import SHORTEST_PROMPT
from mpass.lowering.kv_selection import SnapKV
from mpass.lowering.summaries import RUNS
from mpass.lowering.tiles import Grid, as_grid
from mpass.patterns.base import Pattern, registered_patterns

DEFAULT_MIN_SEQ_LEN = SHORTEST_PROMPT
"""Prompts shorter than this stay dense unless something says otherwise; tokens."""

VALIDATIONS = ("off", "sample", "full")
"""How much of a proven mask is held against the mask that the model computes."""

LINEAR = ("auto", "fp32", "half", "int8", None)
"""What linear layers can multiply in."""

BACKENDS_OF_TORCH = ("inductor", "aot_eager", "eager")
"""Inner backends whose passes leave our linear layers as they are (docs/linear.md)."""

ATTENTION = (None, "int8")
"""What products of queries and keys can be taken in beside what their dtype is served with."""

TRAININGS = ("dense", "sparse")
"""What attention is where gradients are recorded."""


@dataclass(frozen=True)
class Options:
    """What a compile was asked for.

    pattern: one pattern for every head, an object or its name (then exclusive with config), or the
    name of a preset (mpass.config.presets).
    config: a SparseConfig, a pattern per layer and head, or the path of a file that holds one.
    max_loss: how much the model may lose to sparse attention, in nats per token: heads that nothing
    else names a pattern for keep what is expected to lose less (mpass.config.promise). It comes
    before what is shipped with the model, and stands in the place of `pattern`. None for the
    built-in default, which promises nothing.
    min_seq_len: prompts shorter than this stay dense; tokens. None for the config's value, else
    what the lowering of the device says, which is DEFAULT_MIN_SEQ_LEN on CPUs.
    dense_above: share of the dense work above which the op runs dense attention instead.
    inner_backend: what compiles the rewritten graph: any backend that Dynamo knows by name.
    validate: how much of every proof is held against what the graph computes, while compiling:
    "sample" looks at some rows of a mask, "full" at every cell, "off" at nothing.
    read_masks: read a mask that cannot be proven in each call, and run sparse where it has a form
    that the kernels know; on CPUs. False keeps such attention dense.
    linear: "auto" multiplies linear layers of bf16 on CPUs in what is fastest there: in half
    precision (AVX512-FP16), whose sums are as near to fp32 as bf16 is, or in fp32, which loses
    nothing and is all that "fp32" does; "half" multiplies layers of fp16 in half precision as well,
    "int8" in 8 bits on CPUs with VNNI; None leaves them.
    attention: "int8" multiplies queries and keys of sparse attention in 8 bits, on CPUs with VNNI,
    and with AVX512-FP16 weights and values in fp16; None computes the chosen keys exactly.
    training: "sparse" makes attention sparse where gradients are recorded as well, with gradients
    over the keys that were chosen and none through the choice; "dense" leaves it as it is.
    summaries: in attention that is not causal, each run of this many keys that is left out counts
    as one key, their mean: 8, 16, 32 or 64; 0 leaves them out.
    kv_select: a mpass.SnapKV: causal sparse attention selects as well which keys a cache keeps, for
    whoever listens (mpass.select_keys); None for no selection.
    denoising: attention that is not causal keeps over the steps of a sampler what it leaves out, in
    the runs of mpass.denoising, and is dense elsewhere; it needs a pattern.
    grid: how the tokens of attention that is not causal lie in a picture or a video: a mpass.Grid,
    its shape (height, width) or (frames, height, width), or "square". Sparse attention then sees
    them in the order of tiles (mpass.lowering.tiles), which changes no number of dense attention;
    under "content" per head in the order of what they hold (mpass.lowering.similar_order).
    measure: compute some query rows of every sparse attention exactly as well, and report what was
    lost (mpass.lowering.meter); it costs about 3% of dense attention at 8192 tokens.
    debug: write what became of every graph into this folder; True for ./mpass_debug.
    inductor: options passed on to Inductor.
    config_source: where pattern or config come from, in words for the report.
    """

    pattern: Pattern | None = None
    config: SparseConfig | None = None
    max_loss: float | None = None
    min_seq_len: int | None = None
    dense_above: float = 0.6
    inner_backend: str = "inductor"
    validate: str = "sample"
    read_masks: bool = True
    linear: str | None = "auto"
    attention: str | None = None
    training: str = "dense"
    summaries: int = 0
    kv_select: SnapKV | None = None
    denoising: bool = False
    grid: Grid | None = None
    measure: bool = False
    debug: bool | str | os.PathLike[str] = False
    inductor: tuple[tuple[str, Any], ...] = ()
    config_source: str = ""

    @property
    def sparse_config(self) -> SparseConfig:
        """The config that applies where no decorator does."""
        return self.config or SparseConfig(default=self.pattern)

    @property
    def shortest(self) -> int:
        """The length from which prompts become sparse where nothing more specific says so."""
        for length in (self.min_seq_len, self.sparse_config.min_seq_len):
            if length is not None:
                return length
        return DEFAULT_MIN_SEQ_LEN


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Check and split what torch.compile passes on.

    Raises UnknownOptionError for a key that neither we nor Inductor have, OptionValueError for a
    value that a key cannot take, UnknownPatternError for a pattern that is not registered.
    """
    import torch._inductor
    from torch._inductor import config as inductor_config

    own = {field.name for field in dataclasses.fields(Options)} - {"inductor", "config_source"}
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
    if parsed.linear in ("fp32", "half", "int8") and parsed.inner_backend not in BACKENDS_OF_TORCH:
        # zentorch's passes change what the ops of such layers give: see docs/linear.md.
        raise OptionValueError("linear", parsed.linear, "None with another package's inner_backend")
    if parsed.inductor and parsed.inner_backend != "inductor":
        raise OptionValueError(
            "inner_backend", parsed.inner_backend, "'inductor' when Inductor's options are given"
        )
    return parsed


def check_values(values: dict[str, Any]) -> dict[str, Any]:
    """Our own keys with patterns resolved; raises OptionValueError naming the key at fault."""
    config = values.get("config")
    if isinstance(config, str | os.PathLike):
        config = values["config"] = SparseConfig.load(os.fspath(config))
    if config is not None and not isinstance(config, SparseConfig):
        raise OptionValueError("config", config, "a SparseConfig, or the path of its file")
    values["config_source"] = "options['config']" if config is not None else ""
    check_max_loss(values)
    pattern = values.get("pattern")
    if isinstance(pattern, str) and pattern in PRESETS:
        values["pattern"] = None
        values["config"] = with_preset(PRESETS[pattern], config)
        values["config_source"] += f"{' and ' if config else ''}options['pattern'] = {pattern!r}"
    elif pattern is not None:
        if config is not None:
            raise OptionValueError("pattern", pattern, "not together with 'config'")
        try:
            values["pattern"] = as_pattern(pattern)
        except UnknownPatternError:
            raise UnknownPatternError(pattern, [*registered_patterns(), *PRESETS]) from None
        values["config_source"] = "options['pattern']"
    check_length("min_seq_len", values.get("min_seq_len"))
    share = values.get("dense_above", 0.6)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share:
        raise OptionValueError("dense_above", share, "a share of the dense work, 0 or more")
    if "dense_above" in values:
        values["dense_above"] = float(share)
    debug = values.get("debug", False)
    if not isinstance(debug, bool | str | os.PathLike):
        raise OptionValueError("debug", debug, "True, False or a folder")
    validate = values.get("validate", "sample")
    if validate not in VALIDATIONS:
        raise OptionValueError("validate", validate, ", ".join(VALIDATIONS))
    read_masks = values.get("read_masks", True)
    if not isinstance(read_masks, bool):
        raise OptionValueError("read_masks", read_masks, "True or False")
    linear = values.get("linear", "auto")
    if linear not in LINEAR:
        raise OptionValueError("linear", linear, "'auto', 'fp32', 'half', 'int8' or None")
    training = values.get("training", "dense")
    if training not in TRAININGS:
        raise OptionValueError("training", training, ", ".join(TRAININGS))
    attention = values.get("attention")
    if attention not in ATTENTION:
        raise OptionValueError("attention", attention, "'int8' or None")
    if attention and training == "sparse":
        raise OptionValueError("attention", attention, "None together with training='sparse'")
    summaries = values.get("summaries", 0)
    if isinstance(summaries, bool) or summaries not in (0, *RUNS):
        raise OptionValueError("summaries", summaries, f"0, {', '.join(map(str, RUNS))}")
    selecting = values.get("kv_select")
    if selecting is not None and not isinstance(selecting, SnapKV):
        raise OptionValueError("kv_select", selecting, "mpass.SnapKV(...) or None")
    denoising = values.get("denoising", False)
    if not isinstance(denoising, bool):
        raise OptionValueError("denoising", denoising, "True or False")
    if denoising and summaries:
        raise OptionValueError("denoising", denoising, "False together with 'summaries'")
    if values.get("grid") is not None:
        values["grid"] = as_grid(values["grid"])
    measure = values.get("measure", False)
    if not isinstance(measure, bool):
        raise OptionValueError("measure", measure, "True or False")
    inner = values.get("inner_backend", "inductor")
    check_inner_backend(inner)
    return values


def check_max_loss(values: dict[str, Any]) -> None:
    """Raise OptionValueError for a loss that cannot be promised, or beside what decides instead."""
    loss = values.get("max_loss")
    if loss is None:
        return
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not LEAST <= loss <= MOST:
        raise OptionValueError("max_loss", loss, f"nats per token from {LEAST} to {MOST}, or None")
    if values.get("pattern") is not None:
        allowed = "not together with 'pattern', which says what to keep"
        raise OptionValueError("max_loss", loss, allowed)
    config = values.get("config")
    if config is not None and config.default is not None:
        allowed = "not together with a 'config' whose default says what to keep"
        raise OptionValueError("max_loss", loss, allowed)
    values["max_loss"] = float(loss)


def check_inner_backend(name: object) -> None:
    """Raises OptionValueError unless Dynamo knows a backend of that name other than this one.

    Packages register theirs as entry points or when they are imported (`import zentorch`).
    """
    from torch._dynamo.backends.registry import list_backends

    allowed = [known for known in list_backends() if known != "minference"]
    if (name not in allowed and name not in list_backends(exclude_tags=())) or name == "minference":
        # Without the tags that are left out: backends for debugging.
        raise OptionValueError("inner_backend", name, f"{', '.join(allowed)}, eager or aot_eager")
