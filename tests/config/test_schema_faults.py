"""Configs with the mistakes that people make: each is told by its place, and what to write."""

from __future__ import annotations

import json

import pytest

import mpass
from mpass.errors import ConfigFileError

HEAD = {"format": "mpass.sparse_config", "version": 1}

MISTAKES = {
    "name for pattern": (
        {"default": {"name": "a_shape", "sink_size": 64}},
        {"$.default": "the key 'pattern' is missing: it names the pattern, not 'name'"},
    ),
    "a slip of pattern": (
        {"layers": {"0": {"patern": "a_shape"}}},
        {"$.layers['0']": "not 'patern'"},
    ),
    "no name at all": (
        {"layers": {"0": ["dense", {"sink_size": 4}]}},
        {"$.layers['0'][1]": "the key 'pattern' is missing: it names the pattern, as in"},
    ),
    "a slip of a key": ({"defualt": "dense"}, {"$": "'defualt' (did you mean 'default'?)"}),
    "a slip in a layer": (
        {"layers": {"0": {"min_seqlen": 4}}},
        {"$.layers['0']": "'min_seqlen' (did you mean 'min_seq_len'?)"},
    ),
    "a slip of a parameter": (
        {"default": {"pattern": "a_shape", "sink_sise": 4}},
        {"$.default": "(did you mean 'sink_size'?)"},
    ),
    "several at once": (
        {
            "layers": {
                "0": {"default": {"name": "a_shape"}, "heads": [{"name": "dense"}, 7, "dense"]},
                "1": {"heads": {"x": "dense", "1": {"pattern": 3}}, "foo": 1},
                "2": {"name": "a_shape", "sink_size": "x"},
            }
        },
        {
            "$.layers['0'].default": "not 'name'",
            "$.layers['0'].heads[0]": "not 'name'",
            "$.layers['0'].heads[1]": "7 is not of type",
            "$.layers['1']": "unknown key 'foo'; known: default,",
            "$.layers['1'].heads": "'x' does not match",
            "$.layers['1'].heads['1'].pattern": "3 is not of type 'string'",
            "$.layers['2']": "not 'name'",
            "$.layers['2'].sink_size": "'x' is not of type",
        },
    ),
    "no heads": ({"layers": {"0": {"heads": []}}}, {"$.layers['0'].heads": "[]"}),
    "a number for a layer": ({"layers": {"0": 5}}, {"$.layers['0']": "5 is not of type"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_by_its_place_and_what_to_write(mistake):
    document, expected = MISTAKES[mistake]
    with pytest.raises(ConfigFileError) as caught:
        mpass.SparseConfig.from_json(json.dumps(HEAD | document))
    found = dict(caught.value.errors)
    assert found.keys() == expected.keys()
    assert len(found) == len(caught.value.errors)
    for path, words in expected.items():
        assert words in found[path]
