"""Config files in our format; what is wrong with a file is told at once."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpass
from mpass.config.json_format import schema
from mpass.config.layer import LayerConfig
from mpass.errors import ConfigFileError
from tests.helpers.minference_files import per_head

OWN = {
    "format": "mpass.sparse_config",
    "version": 1,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "min_seq_len": 64,
    "default": {"pattern": "vertical_slash", "vertical_size": 100, "slash_size": 200},
    "provenance": {"model": "toy", "lengths": [128, 256]},
    "layers": {
        "0-1": "dense",
        "2": [{"pattern": "a_shape", "sink_size": 4}, "dense", "dense", "block_sparse"],
        "3-": {
            "min_seq_len": 128,
            "heads": {"0-2": "dense", "3": {"pattern": "block_sparse", "top_k": 3}},
            "records": {"3": [0.5]},
        },
    },
}


def load(document: object) -> mpass.SparseConfig:
    return mpass.SparseConfig.from_json(json.dumps(document))


def test_own_format_means_what_it_says():
    config = load(OWN)
    assert config.patterns(0, 4) == (mpass.Dense(),) * 4
    assert config.patterns(2, 4)[0] == mpass.AShape(4)
    assert config.patterns(3, 4) == (*(mpass.Dense(),) * 3, mpass.BlockSparse(3))
    assert config.layer(3) == LayerConfig(
        None,
        (*((i, mpass.Dense()) for i in range(3)), (3, mpass.BlockSparse(3))),
        None,
        128,
    )
    assert (config.min_seq_len, config.effective(3).min_seq_len) == (64, 128)
    assert dict(config.provenance)["lengths"] == [128, 256]


def test_own_format_round_trips_and_follows_the_published_schema(tmp_path):
    config = load(OWN)
    config.save(tmp_path / "a.json")
    again = mpass.SparseConfig.load(tmp_path / "a.json")
    assert again == config
    assert again.to_json() == config.to_json()
    assert again.provenance == config.provenance
    assert again.layer(3).records == ((3, (0.5,)),)
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(json.loads(config.to_json()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    load(OWN).save(path)
    before = path.read_text()
    with pytest.raises(ConfigFileError, match="cannot be written"):
        mpass.SparseConfig(provenance={"x": float("nan")}).save(path)
    with pytest.raises(ConfigFileError, match="cannot be written"):
        mpass.SparseConfig().save(tmp_path / "nowhere" / "a.json")
    assert path.read_text() == before


def edited(*steps: tuple[list, object]) -> dict:
    document = copy.deepcopy(OWN)
    for path, value in steps:
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    return document


def test_all_faults_are_listed_with_their_paths():
    document = edited(
        (["num_heads"], 10**9), (["min_seq_len"], -1), (["layers", "2", 0, "sink_size"], "x")
    )
    with pytest.raises(ConfigFileError) as caught:
        load(document)
    assert {path for path, _ in caught.value.faults} == {
        "$.num_heads",
        "$.min_seq_len",
        "$.layers['2'][0].sink_size",
    }
    document = edited(
        (["default", "slash_size"], -4),
        (["layers", "1-2"], "nope"),
        (["layers", "3-", "heads", "0"], "dense"),
    )
    with pytest.raises(ConfigFileError, match="4 faults") as caught:
        load(document)
    text = str(caught.value)
    for words in (
        "slash_size is -4",
        "unknown pattern 'nope'",
        "overlaps",
        "head 0 is named twice",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[", "not JSON"),
        ("3", "no format"),
        ("{}", "no format"),
        ('{"format": "mpass.sparse_config"}', "version None is not known"),
        ('{"format": "mpass.sparse_config", "version": 2}', r"\$.version: version 2 is not known"),
        ('{"format": "mpass.sparse_config", "version": true}', "version True is not known"),
        (
            '{"format": "mpass.sparse_config", "version": 1, "layers": {"1": "dense", '
            '"1": "a_shape"}}',
            r"\$.layers: key '1' stands here twice",
        ),
        (
            '{"format": "mpass.sparse_config", "version": 1, "provenance": {"a": [NaN]}}',
            r"\$.provenance.a\[0\]: nan",
        ),
        (
            '{"format": "mpass.sparse_config", "version": 1, "min_seq_len": 1e999}',
            r"\$.min_seq_len: inf",
        ),
        (
            '{"format": "mpass.sparse_config", "version": 1, "num_heads": ' + "9" * 5000 + "}",
            "JSON",
        ),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("[]", "names no layer"),
        ('[{"0": ["vertical_and_slash", -5, 10, 0]}]', "sizes"),
        ('[{"0": ["vertical_and_slash", 0, 10, 0]}]', "vertical_size is 0"),
        ('[{"0": ["vertical_and_slash", 1.5, 10, 0]}]', "sizes"),
        ('[{"0": ["tri_shape", 1, 10, 0]}]', "'tri_shape' is not one of"),
        ('[{"0": ["stream_llm", 1]}]', r"must be \[pattern, a, b, score\]"),
        ('[{"1000000000": ["stream_llm", 1, 2, 3]}]', "no number below"),
        ('[{"0": ["stream_llm", 1, 2, 3], "00": ["stream_llm", 1, 2, 3]}]', "named twice"),
        ('[{"0": ["stream_llm", 1, 2, 3], "0": ["stream_llm", 1, 2, 3]}]', "stands here twice"),
        ('{"1": {"0": ["stream_llm", 1, 2, 3]}}', "without a gap"),
        ('{"sparse_attention_config": 4}', "must be a list over layers"),
    ],
)
def test_bad_text_is_refused_in_our_words(text, words):
    with pytest.raises(ConfigFileError, match=words):
        mpass.SparseConfig.from_json(text)


def test_bad_files_are_refused_with_their_name(tmp_path):
    path = tmp_path / "bad.json"
    with pytest.raises(ConfigFileError, match=r"bad\.json.*\n.*cannot be read"):
        mpass.SparseConfig.load(path)
    path.write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(ConfigFileError, match=r"bad\.json.*\n.*not UTF-8: byte 12"):
        mpass.SparseConfig.load(path)
    with pytest.raises(ConfigFileError, match="cannot be read"):
        mpass.SparseConfig.load(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["dense", "a_shape", "0-3", "16-", "vertical_and_slash", 1, 10**9, -1, 1.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    found = [path]
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        found += places(item, (*path, key))
    return found


@st.composite
def mutated(draw) -> str:
    document = copy.deepcopy(draw(st.sampled_from([OWN, per_head(2, 3)])))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([p for p in places(document) if p]))
        place = document
        for key in path[:-1]:
            place = place[key]
        match draw(st.sampled_from(["replace", "drop", "rename"])):
            case "replace":
                place[path[-1]] = draw(JSON)
            case "drop":
                del place[path[-1]]
            case "rename" if isinstance(place, dict):
                key = draw(st.text(max_size=8) | st.sampled_from(["0-", "1", "0-9999", "2-2"]))
                place[key] = place.pop(path[-1])
        if not document:
            break
    text = json.dumps(document)
    cut = draw(st.none() | st.integers(0, len(text)))
    return text if cut is None else text[:cut]


@settings(max_examples=400)
@given(mutated())
def test_a_mutated_file_is_a_valid_config_or_our_error(text):
    try:
        config = mpass.SparseConfig.from_json(text)
    except ConfigFileError as error:
        assert error.faults
        return
    assert mpass.SparseConfig.from_json(config.to_json()) == config
    hash(config)


@settings(max_examples=200)
@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_any_bytes_end_in_our_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    with pytest.raises(ConfigFileError):
        mpass.SparseConfig.load(path)
