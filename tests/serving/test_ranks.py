"""Two processes of torchrun: tensor parallelism finds its heads, context parallelism its chunks."""

from __future__ import annotations

import json

import pytest

from tests.helpers.processes import run_python
from tests.helpers.two_ranks import HEADS, LAYERS, shape

pytestmark = pytest.mark.xdist_group("ranks")  # one pair of processes answers all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found out."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    run_python(
        *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc_per_node", "2", "tests/helpers/two_ranks.py", str(folder)),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def parallel(ranks):
    return [rank["tensor parallel"] for rank in ranks]


def layers_of_shapes(heads):
    """The patterns that `two_ranks.PER_HEAD` gives these heads, by layer."""
    return [[str(shape(layer * HEADS + head)) for head in heads] for layer in range(LAYERS)]


def test_each_rank_plans_the_patterns_of_its_own_heads(ranks):
    first, second = parallel(ranks)
    assert first["one process"] == layers_of_shapes(range(HEADS))
    assert first["sliced"]["planned"] == layers_of_shapes(range(HEADS // 2))
    assert second["sliced"]["planned"] == layers_of_shapes(range(HEADS // 2, HEADS))


def test_ranks_that_gather_what_they_project_plan_all_heads(ranks):
    for found in parallel(ranks):
        assert found["gathered"]["planned"] == layers_of_shapes(range(HEADS))


@pytest.mark.parametrize("plan", ["sliced", "gathered"])
def test_two_ranks_compute_what_one_process_does(ranks, plan):
    for found in parallel(ranks):
        assert found[plan]["difference"] < 1e-5


def test_a_config_of_few_heads_is_for_the_rank_that_has_them(ranks):
    first, second = parallel(ranks)
    others = ["a_shape(9, 90)"] * (HEADS // 2)
    assert first["few heads"] == [[str(shape(0)), *others[1:]], others]
    assert second["few heads"] == [[*others[:2], str(shape(6)), others[3]], others]


def test_a_wrong_config_is_refused_on_each_rank(ranks):
    first, second = (found["wrong"] for found in parallel(ranks))
    assert first.keys() == second.keys() == {"twice the heads", "as many as a slice"}
    for name, number in (("twice the heads", 16), ("as many as a slice", 4)):
        for error in (first[name], second[name]):
            assert error.startswith(
                "ours: ConfigMismatchError: layer 0 has 8 query heads, and here"
            )
            assert f"the config names {number};" in error


def test_a_slice_that_no_weight_tells_of_takes_uniform_patterns_only(ranks):
    for found in parallel(ranks):
        assert "4 of the model's 8 query heads" in found["slice by hand, named"]
        assert "head_offset=" in found["slice by hand, named"]
        assert found["slice by hand, uniform"] == ""


def test_heads_that_do_not_divide_among_ranks_are_the_engines_to_refuse(ranks):
    for rank in ranks:
        assert rank["uneven heads"].startswith("theirs: ")
        assert "is invalid for input of size" in rank["uneven heads"]


def test_chunks_of_a_context_parallel_prompt_are_one_call_or_nearer_to_dense(ranks):
    for rank in ranks:
        found = rank["context parallel"]
        static = [name for name in found if name.startswith("a_shape")]
        assert static and all(found[name]["equal"] for name in static)
        for name in set(found) - set(static):
            one, chunks = found[name]["error of one call"], found[name]["error of chunks"]
            assert not found[name]["equal"]
            assert chunks < one, name
