"""Config files of MInference and Qwen: what they say, and what a model makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mpass
from mpass.errors import ConfigFileError
from tests.helpers.minference_files import ENTRIES, per_head
from tests.helpers.paths import ROOT
from tests.helpers.toys import Decoder, compile_toy

PUBLISHED = ROOT.parent / "shared" / "data" / "minference_configs"


def load(document: object) -> mpass.SparseConfig:
    return mpass.SparseConfig.from_json(json.dumps(document))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layers: layers,
        lambda layers: {str(i): layer for i, layer in enumerate(layers)},
        lambda layers: [list(layer.values()) for layer in layers],
        lambda layers: {"dual_chunk_attention_config": {"sparse_attention_config": layers}},
        lambda layers: {"model_type": "qwen3", "sparse_attention_config": layers},
    ],
    ids=["published", "by layer", "lists of heads", "config_1m.json", "flat key"],
)
def test_minference_forms_load_alike_and_are_written_back_equal(wrap):
    layers = per_head(3, 5)
    config = load(wrap(layers))
    assert json.loads(config.to_minference()) == layers
    again = mpass.SparseConfig.from_json(config.to_json())
    assert again == config
    assert json.loads(again.to_minference()) == layers


def test_minference_entries_become_patterns():
    config = load([{"0": [*entry]} for entry in ENTRIES])
    assert [config.pattern(layer, 0) for layer in range(5)] == [
        mpass.VerticalSlash(1000, 6096),
        mpass.VerticalSlash(30, 800),
        mpass.VerticalSlash(3500, 100),
        mpass.AShape(100, 800),
        mpass.BlockSparse(100),
    ]
    sparse = [{"1": ["stream_llm", 1, 2, 0]}, {}]
    assert load(sparse).patterns(0, 2) == (mpass.VerticalSlash(1000, 6096), mpass.AShape(1, 2))
    assert load(sparse).patterns(1, 1) == (mpass.VerticalSlash(1000, 6096),)
    assert json.loads(load(sparse).to_minference()) == sparse


@pytest.mark.parametrize(
    "config",
    [
        mpass.SparseConfig("dense", num_layers=1, num_heads=1),
        mpass.SparseConfig("a_shape", num_layers=1),
        mpass.SparseConfig(layers={"0-": "a_shape"}, num_heads=2),
        mpass.SparseConfig("a_shape", num_layers=1, num_heads=1, min_seq_len=5),
        mpass.SparseConfig(layers={0: {0: mpass.BlockSparse(7)}}, num_heads=1),
    ],
)
def test_what_minference_cannot_say_is_refused(config):
    with pytest.raises(ConfigFileError, match="MInference"):
        config.to_minference()


def published() -> list[Path]:
    return sorted(PUBLISHED.glob("*.json"))


@pytest.mark.skipif(not published(), reason="no published files in ../shared/data")
@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem[:20])
def test_published_files_are_read_and_written_back_equal(path):
    config = mpass.SparseConfig.load(path)
    assert json.loads(config.to_minference()) == json.loads(path.read_text())
    assert mpass.SparseConfig.from_json(config.to_json()) == config


def keys_of_entry(entry: list, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The cells that MInference's rule for one head selects: bool [N, N] of inputs [N, D]."""
    name, a, b, _ = entry
    length, last = len(key), min(64, len(key))
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    distance = rows - columns
    if name == "stream_llm":
        return (distance >= 0) & ((columns < a) | (distance < b))
    if name == "block_sparse":
        blocks = -(-length // 64)
        padded = torch.nn.functional.pad(torch.stack([query, key]), (0, 0, 0, blocks * 64 - length))
        pooled_query, pooled_key = padded.unflatten(1, (blocks, 64)).mean(2)
        scores = pooled_query @ pooled_key.T
        causal = torch.ones(blocks, blocks).tril() > 0
        best = scores.masked_fill(~causal, -torch.inf).topk(min(100, blocks)).indices
        table = torch.zeros(blocks, blocks, dtype=torch.bool).scatter_(1, best, True) & causal
        cells = table.repeat_interleave(64, 0).repeat_interleave(64, 1)[:length, :length]
        return cells & (distance >= 0)
    scores = query[-last:] @ key.T * query.shape[1] ** -0.5
    seen = distance[-last:] >= 0
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    vertical = weights.sum(0)
    vertical[:30] = torch.inf
    slash = torch.stack([weights[distance[-last:] == s].sum() for s in range(length)])
    slash[:100] = torch.inf
    kept_columns = vertical.topk(min(length, max(a, 30))).indices
    kept_distances = slash.topk(min(length, max(b, 50))).indices
    kept = torch.isin(columns, kept_columns) | torch.isin(distance, kept_distances)
    return kept & (distance >= 0)


@pytest.mark.parametrize(
    "entry",
    [
        *ENTRIES,
        ["vertical_and_slash", 30, 100, 0],
        ["vertical_and_slash", 60, 150, 0],
        ["stream_llm", 70, 90, 0],
    ],
    ids=str,
)
def test_every_key_that_minferences_rules_select_is_computed(entry):
    torch.manual_seed(1)
    query, key = torch.randn(2, 1, 2, 500, 16).unbind()
    pattern = load([{"0": entry}]).pattern(0, 0)
    computed = mpass.computed_mask(query, key, pattern=pattern)
    for head in range(2):
        selected = keys_of_entry(entry, query[0, head], key[0, head])
        assert selected.any(1).all()
        assert not (selected & ~computed[0, head]).any()


def shapes() -> list:
    made = [pytest.param(per_head(3, 8), id="made here")]
    return made + [
        pytest.param(json.loads(path.read_text()), id=path.stem[:20], marks=pytest.mark.slow)
        for path in published()
    ]


@pytest.mark.parametrize("layers", shapes())
@torch.no_grad()
def test_a_model_of_the_files_shape_gets_the_sizes_that_it_names(layers):
    torch._dynamo.reset()
    heads = len(layers[0])
    model = Decoder(depth=len(layers), dim=4 * heads, heads=heads, kv_heads=heads // 4).eval()
    compile_toy(model, {"config": load(layers)})(torch.randn(1, 130, 4 * heads))
    sites = mpass.last_report().sites
    assert [site.status for site in sites] == ["sparse"] * len(layers)
    names = {
        "vertical_and_slash": lambda a, b: mpass.VerticalSlash(a, b),
        "stream_llm": lambda a, b: mpass.AShape(a, b),
        "block_sparse": lambda a, b: mpass.BlockSparse(100),
    }
    for site, layer in zip(sites, layers, strict=True):
        assert site.patterns == tuple(
            str(names[layer[str(head)][0]](*layer[str(head)][1:3])) for head in range(heads)
        )
