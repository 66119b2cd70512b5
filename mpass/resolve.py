"""Which pattern a head gets when several places name one: the order of precedence.

Innermost first, head by head:

1. decorators and regions (mpass.config.decorators), the innermost first;
2. options["config"], or options["pattern"], and for what these leave open options["max_loss"];
3. `minference.json` beside the model's `config.json` (the folder that it was loaded from);
4. the built-in default.

The shortest sparse prompt follows the same order, with options["min_seq_len"] before the config.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from mpass.config.decorators import Override, overrides_of
from mpass.config.layer import LayerConfig
from mpass.config.spans import in_spans
from mpass.config.sparse_config import SparseConfig, builtin_default
from mpass.errors import UnknownLayerError
from mpass.graph.guards import count_layers, guard_equal, guarded_layer, live_stack, root_module
from mpass.graph.nodes import example, number_now, shape_of
from mpass.graph.shards import OwnedHeads, owned_heads
from mpass.graph.site import AttentionSite
from mpass.graph.tile_nodes import OPTION
from mpass.lowering.tiles import Grid
from mpass.options import Options
from mpass.patterns.base import Pattern

BUILTIN = "built-in default"
PROMISED = "options['max_loss']"
"""The source of a pattern that nothing configures."""

SHIPPED = "minference.json"
"""File beside a model's config.json that brings its SparseConfig along."""


@dataclass(frozen=True)
class ResolvedPatterns:
    """What was resolved for one site.

    layer: the site's layer, found out if its path did not tell; patterns: one per query head;
    min_seq_len: tokens, None where nothing says so; source: which place decided, in words.
    grid: how tokens lie, None where nothing says so; grid_source: which place says so.
    """

    layer: int
    patterns: tuple[Pattern, ...]
    min_seq_len: int | None
    source: str
    grid: Grid | None = None
    grid_source: str = ""


def resolve_site(site: AttentionSite, options: Options) -> ResolvedPatterns:
    """The patterns of a site. Raises ConfigMismatchError, and ConfigFileError for a shipped file.

    UnknownLayerError is one where patterns are given by layer and no module tells the layer.

    May install guards: on the layer's number and on the model's folder, if they decide.
    """
    root = root_module()
    overrides = overrides_of(site.output, root.module if root else None)
    given = options.sparse_config
    promised = options.max_loss is not None
    shipped = None if promised or covers_all(given) else shipped_config(site.output)
    configs = [given] if shipped is None else [given, shipped[0]]

    layer = site.layer
    layered = any(c.depends_on_layer for c in configs) or any(o.layers for o in overrides)
    if layer < 0 and layered:
        layer = guarded_layer(site.output)
    if layer < 0:
        refuse_layers(site, overrides, options, shipped)
    heads = owned_by(site, overrides)
    offset, total = heads.offset, heads.total
    for config in configs:
        config.check_site(
            *(layer, site.num_heads, site.num_kv_heads), head_offset=offset, total_heads=total
        )
        if config.num_layers is not None and (count := count_layers(site.output)) is not None:
            config.check_num_layers(count)

    levels = [(o.label, o.layer) for o in overrides if o.applies_to(layer)]
    for label, own in levels:
        own.check_heads(site.num_heads, offset, f"the attention under {label}", total)
    named = [own.heads for _, own in levels] + [config.layer(layer).heads for config in configs]
    if any(named):
        heads.check_known(site.num_heads, layer)
    levels.append(("options['min_seq_len']", LayerConfig(min_seq_len=options.min_seq_len)))
    levels.append((options.config_source or "options", given.effective(layer)))
    if shipped is not None:
        levels.append((str(shipped[1]), shipped[0].effective(layer)))
    window, causal = (site.mask.window, site.mask.causal) if site.mask else (0, True)
    device, max_loss = example(site.query).device.type, options.max_loss
    default = builtin_default(device, window, causal=causal, max_loss=max_loss)
    last = BUILTIN if max_loss is None else f"{PROMISED} = {max_loss:g}"
    levels.append((last, LayerConfig(default)))
    levels.append((OPTION, LayerConfig(grid=options.grid)))
    return resolve_heads(layer, [(offset or 0) + head for head in range(site.num_heads)], levels)


def owned_by(site: AttentionSite, overrides: list[Override]) -> OwnedHeads:
    """The heads of its layer that a site owns: what `head_offset=` says, else what weights say."""
    given = next((o.head_offset for o in overrides if o.head_offset is not None), None)
    modules = [live.module for live in reversed(live_stack(site.output))]
    value_dim = number_now(shape_of(site.value)[-1])
    return owned_heads(modules, site.num_heads, site.head_dim, value_dim, given)


def refuse_layers(
    site: AttentionSite,
    overrides: list[Override],
    options: Options,
    shipped: tuple[SparseConfig, Path] | None,
) -> None:
    """Raise UnknownLayerError where something is said of single layers: it cannot be applied."""
    given_by = [o.label for o in overrides if o.layers is not None]
    if options.sparse_config.layers:
        given_by.append(options.config_source or "options")
    if shipped is not None and shipped[0].layers:
        given_by.append(str(shipped[1]))
    if given_by:
        raise UnknownLayerError(site.path, given_by[0])


def resolve_heads(
    layer: int, heads: list[int], levels: list[tuple[str, LayerConfig]]
) -> ResolvedPatterns:
    """The first level that names a pattern, for each head; one level names all."""
    picked = [
        next((label, p) for label, own in levels if (p := own.pattern(head))) for head in heads
    ]
    length = next((own.min_seq_len for _, own in levels if own.min_seq_len is not None), None)
    sources: dict[str, list[int]] = {}
    for head, (label, _) in zip(heads, picked, strict=True):
        sources.setdefault(label, []).append(head)
    if len(sources) == 1:
        source = next(iter(sources))
    else:
        source = ", ".join(f"{label} (heads {in_spans(own)})" for label, own in sources.items())
    patterns = tuple(pattern for _, pattern in picked)
    grid = next(((own.grid, label) for label, own in levels if own.grid is not None), (None, ""))
    return ResolvedPatterns(layer, patterns, length, source, *grid)


def covers_all(config: SparseConfig) -> bool:
    """Whether a config leaves no head open, so that what comes after it does not matter."""
    return config.default is not None


def shipped_config(node: fx.Node) -> tuple[SparseConfig, Path] | None:
    """The config beside the model that a node belongs to, and its path; None if there is none.

    The folder is what transformers keeps as `model.config._name_or_path`. It is guarded, so that
    models from other folders do not share the graph. Raises ConfigFileError for a bad file.
    """
    for live in live_stack(node):
        folder = getattr(getattr(live.module, "config", None), "_name_or_path", None)
        if not isinstance(folder, str):
            continue
        guard_equal(live, "config", "_name_or_path")
        path = Path(folder) / SHIPPED
        if folder and path.is_file():
            status = path.stat()
            return load_shipped(path, status.st_mtime_ns, status.st_size), path
        return None
    return None


@functools.lru_cache(maxsize=16)
def load_shipped(path: Path, modified: int, size: int) -> SparseConfig:
    """The config of a file, read again when it has changed."""
    return SparseConfig.load(path)
