"""SparseConfig, presets and the order of precedence: who decides about a head."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import mpass
from mpass.config.layer import LayerConfig
from mpass.config.promise import pattern_for_loss
from mpass.config.spans import Span
from mpass.config.sparse_config import builtin_default
from mpass.errors import ConfigMismatchError, MpassError, OptionValueError, UnknownPatternError
from mpass.options import parse_options
from tests.helpers.toys import Attention, Decoder, compile_toy, tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def sites() -> tuple[mpass.report.SiteReport, ...]:
    return mpass.last_report().sites


@torch.no_grad()
def compiled(model: nn.Module, **options) -> torch.Tensor:
    return compile_toy(model.eval(), options)(torch.randn(1, 300, 32))


def test_spans_lists_and_heads_say_what_each_head_uses():
    config = mpass.SparseConfig(
        "a_shape",
        {"0-1": "dense", 2: ["dense", mpass.AShape(1, 9)], 3: {"0-1": "dense"}, "16-": "dense"},
    )
    assert config.patterns(1, 2) == (mpass.Dense(),) * 2
    assert config.patterns(2, 2) == (mpass.Dense(), mpass.AShape(1, 9))
    assert config.patterns(3, 3) == (mpass.Dense(), mpass.Dense(), mpass.AShape())
    assert config.patterns(5, 2) == (mpass.AShape(),) * 2
    assert config.patterns(2000, 1) == (mpass.Dense(),)
    assert config.patterns(-1, 1) == (mpass.AShape(),)
    assert mpass.SparseConfig(layers={range(2, 4): "dense"}).layers[0][0] == Span(2, 3)
    assert mpass.SparseConfig().patterns(0, 1) == (builtin_default(),)


def test_equal_configs_have_equal_hashes_and_provenance_decides_nothing():
    left = mpass.SparseConfig("dense", {"1-2": "a_shape"}, provenance={"date": ["x"]})
    right = mpass.SparseConfig("dense", [(Span(1, 2), LayerConfig(mpass.AShape()))])
    assert (left, hash(left)) == (right, hash(right))
    assert left != mpass.SparseConfig("dense", {"1-3": "a_shape"})


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": {"0-3": "dense", 2: "dense"}},
        {"layers": {"4-": "dense", "9-": "dense"}},
        {"layers": {-1: "dense"}},
        {"layers": {True: "dense"}},
        {"layers": {"3-1": "dense"}},
        {"layers": {"1234567890": "dense"}},
        {"layers": {"٣": "dense"}},
        {"layers": {0: []}},
        {"layers": {0: 7}},
        {"layers": {0: {"0-1": "dense", 1: "dense"}}},
        {"layers": {0: {"1-": "dense"}}},
        {"layers": {0: {10**9: "dense"}}},
        {"num_layers": 0},
        {"num_heads": 10**9},
        {"num_kv_heads": 2.0},
        {"min_seq_len": -1},
        {"min_seq_len": True},
        {"default": 3},
        {"default": "denes"},
    ],
)
def test_nonsense_is_refused_when_a_config_is_made(arguments):
    with pytest.raises(MpassError):
        mpass.SparseConfig(**arguments)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mpass.SparseConfig(layers={0: ["dense"] * 3}), "layer 0 has 4 query heads.* names 3"),
        (mpass.SparseConfig(layers={1: {7: "dense"}}), "layer 1 has 4 query heads.* names 8"),
        (mpass.SparseConfig(num_heads=8), "4 query heads, the config names 8"),
        (mpass.SparseConfig(num_kv_heads=4), "2 kv heads, the config is for 4"),
        (mpass.SparseConfig(num_layers=2), "has 3 layers, the config is for 2"),
        (mpass.SparseConfig(num_layers=4), "has 3 layers, the config is for 4"),
    ],
)
def test_config_of_another_model_is_refused_at_compile_time(config, words):
    with pytest.raises(BackendCompilerFailed, match=f"(?s)ConfigMismatchError.*{words}"):
        compiled(Decoder(), config=config)


def test_heads_of_another_model_are_named_without_compiling_too():
    config = mpass.SparseConfig(layers={2: ["dense"] * 8})
    with pytest.raises(ConfigMismatchError, match="layer 2 has 9 query heads"):
        config.patterns(2, 9)
    config.check_site(2, 4, head_offset=4)
    with pytest.raises(ConfigMismatchError, match="from 5 on"):
        config.check_site(2, 4, head_offset=5)


def test_every_level_of_the_precedence(tmp_path):
    """Innermost decorator, options, the config shipped with the model, the built-in default."""
    shipped = tmp_path / "minference.json"
    mpass.SparseConfig(mpass.AShape(1, 9), min_seq_len=200).save(shipped)

    class Plain(Decoder):
        def __init__(self, cls: type[nn.Module] = Attention):
            nn.Module.__init__(self)
            self.layers = nn.ModuleList([cls()])
            self.config = types.SimpleNamespace(_name_or_path=str(tmp_path))

    @mpass.configure(pattern=mpass.AShape(2, 9), heads="0-1")
    class Decorated(Attention):
        pass

    class Inner(Decorated):
        def forward(self, x):
            with mpass.configure(pattern=mpass.AShape(3, 9), heads=0):
                return super().forward(x)

    given = mpass.AShape(4, 9)
    cases = [
        (Plain(Inner), {"pattern": given}, [3, 2, 4, 4]),
        (Plain(Decorated), {"pattern": given}, [2, 2, 4, 4]),
        (Plain(Decorated), {}, [2, 2, 1, 1]),
        (Plain(), {"config": mpass.SparseConfig(layers={0: {0: given}})}, [4, 1, 1, 1]),
        (Plain(), {"config": mpass.SparseConfig(given)}, [4] * 4),
        (Plain(), {"pattern": "auto"}, [1] * 4),
        (Plain(), {}, [1] * 4),
    ]
    for model, options, sinks in cases:
        compiled(model, **options)
        (site,) = sites()
        assert site.patterns == tuple(str(mpass.AShape(sink, 9)) for sink in sinks)
    assert sites()[0].config_source == str(shipped)

    torch._dynamo.reset()
    compiled(Plain(Inner), pattern=given)
    assert sites()[0].config_source == (
        "with configure (heads 0), configure on test_every_level_of_the_precedence.<locals>."
        "Decorated (heads 1), options['pattern'] (heads 2-3)"
    )
    shipped.unlink()
    torch._dynamo.reset()
    compiled(Plain())
    assert sites()[0].config_source == "built-in default"
    assert sites()[0].patterns == (str(builtin_default()),) * 4


def test_the_shortest_prompt_follows_the_precedence():
    def reason(model: nn.Module, **options) -> str:
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(
                model.eval(), backend="minference", options={"inner_backend": "eager", **options}
            )(torch.randn(1, 300, 32))
        return sites()[0].reason

    config = mpass.SparseConfig("a_shape", {0: LayerConfig(min_seq_len=301)}, min_seq_len=200)
    assert reason(Decoder(depth=1)) == "300 keys, sparse from 2048 on"
    assert reason(Decoder(depth=1), config=config) == "300 keys, sparse from 301 on"
    later = Attention()
    later.layer_idx = 1
    assert reason(later, config=config) == ""
    assert reason(later, config=config, min_seq_len=400) == "300 keys, sparse from 400 on"
    decorated = mpass.configure(min_seq_len=500)(type("Own", (Attention,), {}))
    assert reason(decorated(), min_seq_len=1) == "300 keys, sparse from 500 on"


def test_a_bad_shipped_file_is_reported_with_its_path(tmp_path):
    (tmp_path / "minference.json").write_text("[[]")
    model = Decoder(depth=1)
    model.config = types.SimpleNamespace(_name_or_path=str(tmp_path))
    with pytest.raises(BackendCompilerFailed, match=r"ConfigFileError.*minference\.json"):
        compiled(model)


def test_models_from_two_folders_do_not_share_a_graph(tmp_path):
    models = []
    for name, sink in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        mpass.SparseConfig(mpass.AShape(sink, 9)).save(tmp_path / name / "minference.json")
        model = Decoder(depth=1)
        model.config = types.SimpleNamespace(_name_or_path=str(tmp_path / name))
        models.append(model)
    models.append(Decoder(depth=1))
    models[-1].config = types.SimpleNamespace(_name_or_path="")
    seen = []
    for model in models:
        compiled(model)
        seen.append(sites()[0].patterns[0])
    assert seen == ["a_shape(1, 9)", "a_shape(2, 9)", str(builtin_default())]


def test_presets_name_whole_configs(tmp_path):
    minference = parse_options(None, {"pattern": "minference"})
    assert minference.sparse_config.patterns(3, 2) == (mpass.VerticalSlash(1000, 6096),) * 2
    assert minference.config_source == "options['pattern'] = 'minference'"
    path = tmp_path / "heads.json"
    path.write_text(json.dumps([{"0": ["vertical_and_slash", 30, 800, 0.5]}]))
    with_file = parse_options(None, {"pattern": "minference", "config": path}).sparse_config
    expected = (mpass.VerticalSlash(30, 800), mpass.VerticalSlash(1000, 6096))
    assert with_file.patterns(0, 2) == expected
    auto = parse_options(None, {"pattern": "auto"})
    assert auto.sparse_config == mpass.SparseConfig()
    with pytest.raises(UnknownPatternError, match=r"did you mean 'minference'.*auto"):
        parse_options(None, {"pattern": "minferense"})
    with pytest.raises(OptionValueError, match="not together"):
        parse_options(None, {"pattern": "dense", "config": path})


def test_a_promised_loss_decides_where_nothing_names_a_pattern(tmp_path):
    shipped = tmp_path / "minference.json"
    mpass.SparseConfig(mpass.AShape(1, 9)).save(shipped)
    model = Decoder(depth=2)
    model.config = types.SimpleNamespace(_name_or_path=str(tmp_path))
    compiled(model, config=mpass.SparseConfig(layers={0: {0: mpass.AShape(4, 9)}}), max_loss=0.02)
    promised = str(pattern_for_loss(0.02))
    assert sites()[0].patterns == ("a_shape(4, 9)", *[promised] * 3)
    assert sites()[1].patterns == (promised,) * 4
    assert sites()[1].config_source == "options['max_loss'] = 0.02"


def test_a_promised_loss_keeps_short_windows_whole():
    assert builtin_default("cpu", window=512, max_loss=0.01) == mpass.Dense()
    assert builtin_default("cpu", window=100_000, max_loss=0.01) == pattern_for_loss(0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_loss": 0.0}, "max_loss.*0.0.*nats per token from 0.001 to 0.1"),
        ({"max_loss": 1}, "nats per token from 0.001"),
        ({"max_loss": True}, "nats per token from 0.001"),
        ({"max_loss": "1%"}, "nats per token from 0.001"),
        ({"max_loss": math.nan}, "nats per token from 0.001"),
        ({"max_loss": 0.01, "pattern": "union"}, "not together with 'pattern'"),
        ({"max_loss": 0.01, "pattern": "auto"}, "not together with 'pattern'"),
        ({"max_loss": 0.01, "pattern": "minference"}, "not together with 'pattern'"),
        ({"max_loss": 0.01, "config": mpass.SparseConfig("union")}, "default says what to keep"),
    ],
)
def test_a_loss_that_cannot_be_promised_is_refused(options, words):
    with pytest.raises(OptionValueError, match=words):
        parse_options(None, options)


def test_options_take_the_path_of_a_file(tmp_path):
    path = tmp_path / "mine.json"
    mpass.SparseConfig(mpass.AShape(5, 9), {1: "dense"}).save(path)
    compiled(Decoder(depth=2), config=str(path))
    assert [site.status for site in sites()] == ["sparse", "dense"]
    assert sites()[0].patterns == ("a_shape(5, 9)",) * 4
    assert sites()[0].config_source == "options['config']"


def test_builtin_default_computes_short_windows_whole():
    assert builtin_default("cpu", window=512) == mpass.Dense()
    assert builtin_default("cpu").name == "union"
    assert builtin_default("cuda").name == "union"
    assert builtin_default("cpu", window=100_000).name == "union"


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "layer by layer"])
def test_a_config_shipped_in_a_transformers_folder_is_used(tmp_path, regional):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tiny_llama().save_pretrained(tmp_path)
    mpass.SparseConfig(
        layers={0: mpass.AShape(1, 9), 1: mpass.AShape(2, 9)}, num_layers=2, num_heads=4
    ).save(tmp_path / "minference.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    options = {"inner_backend": "eager", "min_seq_len": 128}
    before = len(mpass.reports())
    for module in model.model.layers if regional else [model]:
        module.compile(backend="minference", fullgraph=True, options=options)
    with torch.no_grad():
        model(torch.arange(200)[None] % 32)
    found = [site for report in mpass.reports()[before:] for site in report.sites]
    assert [site.patterns[0] for site in found] == ["a_shape(1, 9)", "a_shape(2, 9)"]
    assert {site.config_source for site in found} == {str(tmp_path / "minference.json")}


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (mpass.SparseConfig(num_heads=16), 16),
        (mpass.SparseConfig(layers={0: ["dense"] * 4}), 4),
        (mpass.SparseConfig(layers={0: ["dense"] * 6}), 6),
        (mpass.SparseConfig(layers={0: {8: "dense"}}), 9),
    ],
)
@pytest.mark.parametrize("offset", [0, 4])
def test_a_slice_of_known_heads_is_held_against_all_of_them(config, number, offset):
    """Whatever the slice: a rank that refused alone would leave the others waiting."""
    with pytest.raises(ConfigMismatchError, match=f"8 query heads, and here 4.*names {number};"):
        config.check_site(0, 4, 2, head_offset=offset, total_heads=8)


@pytest.mark.parametrize("offset", [0, 4])
def test_a_slice_takes_a_config_of_all_heads_or_of_some(offset):
    for layer in (["dense"] * 8, {0: "dense"}, {"3-5": "dense"}):
        config = mpass.SparseConfig(layers={0: layer})
        config.check_site(0, 4, 2, head_offset=offset, total_heads=8)
