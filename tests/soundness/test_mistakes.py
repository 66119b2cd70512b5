"""The fuzzer finds what it is there for: each old mistake is put back in, and has to be noticed.

A mistake is a small patch of the package. `parts` are those of the programs that may be drawn while
it is searched for, so that a search is short. Three mistakes are looked for in the default run.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
from hypothesis import Phase, given, settings

import mpass.graph.writes
from mpass import rewrite
from mpass.graph import dead_code
from mpass.graph.nodes import op_name
from mpass.graph.observation import NOTHING
from mpass.masks import conjuncts, emitter, prover, reader
from mpass.masks.expressions import as_truth
from mpass.masks.prover import RULES
from mpass.masks.rules import indexing, values
from mpass.match import eager, eager_scores, sdpa
from tests.soundness.programs import drawn, wrong
from tests.soundness.test_fuzz import examples

MASKS = {
    "before": ("",),
    "scores": ("sdpa", "sdpa_additive", "plain", "by_where"),
    "between": ("",),
    "after": ("", "add"),
}
DIFFERENCE = r"^(differs by|the cache differs|another shape)"


@dataclass(frozen=True)
class Mistake:
    """What to patch, the parts of programs among which it is looked for, and how it shows."""

    patch: Callable[[pytest.MonkeyPatch], None]
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    quick: bool = False
    shows: str = DIFFERENCE


def replaced(place: Any, name: str, function: Callable[..., Any]) -> Callable[..., None]:
    """A patch of one function; `function` gets the old one first."""
    old = getattr(place, name)
    return lambda m: m.setattr(place, name, lambda *args: function(old, *args))


def rule(name: str, function: Callable[..., Any]) -> Callable[..., None]:
    """A patch of one mask rule; `function` gets the old one first."""
    old = RULES[name]
    return lambda m: m.setitem(RULES, name, lambda call: function(old, call))


def empty_end(old, item, size):
    begin, end = old(item, size)
    return begin, None if end == 0 else end


def true_anyway(old, call):
    old(call)
    return sympy.true


def where_by_place(_old, call):
    given = [*call.node.args, *call.node.kwargs.values()]
    call.skip(0)
    condition, yes, no = map(call.broadcast, given)
    return values.stored_choice(call, as_truth(condition), yes, no)


def blind_to(*names):
    """Writes of these ops are not seen, and they may be dropped."""
    return replaced(
        mpass.graph.writes,
        "observe",
        lambda old, node: NOTHING if named(node) in names else old(node),
    )


def named(node):
    return op_name(node).rpartition(".")[2] if node.op.startswith("call") else ""


def forgiving(place, name, words):
    """A reason of these words is none."""
    return replaced(
        place, name, lambda old, *args: "" if words in (reason := old(*args)) else reason
    )


def without_problem(old, *args):
    chain = old(*args)
    if chain is not None and "maximum" in chain.problem:
        chain.problem = ""
    return chain


def eagerly_dead(m):
    """Whatever nothing reads is dead, as fx thinks."""

    def remove(graph, _replaced):
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op.startswith("call") and named(node) != "setitem":
                graph.erase_node(node)

    m.setattr(rewrite, "remove_dead", remove)


def unkept_writes(m):
    """A write is not kept by those who read what it wrote, nor by lying in the output."""
    outside = dead_code.external_memory
    found = dead_code.find_candidates

    def find(graph, roots, writes):
        candidates = found(graph, roots, writes)
        m.setattr(writes, "writes_to", lambda _node: [])
        return candidates

    m.setattr(dead_code, "find_candidates", find)
    m.setattr(
        dead_code, "external_memory", lambda graph, _roots, writes: outside(graph, (), writes)
    )


def mask_forgotten(m):
    """Where attention is causal anyway, its mask is not looked at."""
    old = sdpa.mask_of

    def mask_of(node, call, *rest):
        forgotten = dataclasses.replace(call, attn_mask=None) if call.is_causal is True else call
        return old(node, forgotten, *rest)

    m.setattr(sdpa, "mask_of", mask_of)
    forgiving(sdpa, "reason_to_stay", "together with is_causal")(m)


def per_head_dropped(old, term, sizes, terms):
    if conjuncts.HEAD not in term.free_symbols:
        old(term, sizes, terms)


def unknown_dropped(old, condition, sizes):
    terms = old(condition, sizes)
    terms.unknown.clear()
    return terms


def without_alpha(_old, call):
    call.argument(None, "alpha")
    return values.lift(operator.sub, call.operand(0, "input"), call.operand(1))


def any_view(m):
    m.setattr(reader, "same_view", lambda _left, _right: True)
    m.setattr(
        reader.GraphReader,
        "_evaluate",
        lambda self, node, write: self._apply(node, node),
    )


MISTAKES = {
    "assignment to an empty slice": Mistake(
        replaced(indexing, "setitem_bounds", empty_end),
        MASKS | {"edits": ("window", "window_sinks", "padding")},
        quick=True,
    ),
    "a lost window": Mistake(
        rule("lt", true_anyway), MASKS | {"edits": ("window", "window_sinks")}, quick=True
    ),
    "a lost softcap": Mistake(
        replaced(eager, "read_scores", lambda old, *c: dataclasses.replace(old(*c), softcap=0.0)),
        {"scores": ("softcap", "plain")},
        quick=True,
    ),
    "keywords by place": Mistake(
        rule("where", where_by_place),
        MASKS | {"edits": ("keyword_where", "keyword_where_swapped")},
    ),
    "a list of tensors written": Mistake(
        blind_to("foreach_mul", "foreach_copy", "foreach_zero"),
        {"edits": ("foreach_zero",), "before": ("", "cache_foreach"), "after": ("", "add")},
    ),
    "an activation in place": Mistake(
        blind_to("hardswish", "leaky_relu"), {"before": ("relu_inplace", "leaky_keyword")}
    ),
    "a write through a detached view": Mistake(
        blind_to("mul"), {"before": ("data_write", "scale_q"), "after": ("",)}
    ),
    "writes to a mask": Mistake(
        any_view, MASKS | {"edits": ("late_write", "masked_fill_", "columns_hidden")}
    ),
    "scores set to zero": Mistake(
        lambda m: m.setattr(prover, "seen_scores", lambda two, *_: prover.visible(two[0])),
        {"scores": ("zeroed", "own_zeroed", "plain"), "edits": ("window",)},
    ),
    "the maximum before sinks or tanh": Mistake(
        replaced(eager, "trace_scores", without_problem),
        {"scores": ("amax_softcap", "amax_sinks", "amax")},
    ),
    "casts of scores to integers": Mistake(
        lambda m: m.setattr(eager, "precision_problem", lambda *_: ""),
        {"scores": ("byte", "half", "plain")},
    ),
    "numbers of a comparison in place": Mistake(
        lambda m: m.setattr(reader, "as_stored", lambda expr, _dtype: expr),
        MASKS | {"scores": ("sdpa_one_zero", "sdpa"), "edits": ("window",)},
    ),
    "keys written after the scores": Mistake(
        lambda m: m.setattr(eager, "written_late", lambda *_: ""),
        {"scores": ("plain",), "between": ("key_written", "query_written")},
    ),
    "a key mask in a dtype that wraps": Mistake(
        lambda m: m.setattr(emitter.Emitter, "widened", lambda _self, node: node),
        MASKS | {"edits": ("narrow_padding", "narrow_product")},
    ),
    "a window per head": Mistake(
        replaced(conjuncts, "classify_conjunct", per_head_dropped),
        MASKS | {"edits": ("per_head", "window")},
    ),
    "terms of no known form": Mistake(
        replaced(prover, "classify_conjuncts", unknown_dropped),
        MASKS | {"edits": ("chunks", "dilated", "query_padding", "per_row")},
    ),
    "alpha": Mistake(rule("sub", without_alpha), MASKS | {"edits": ("alpha", "window")}),
    "the step of an assignment": Mistake(
        replaced(indexing, "slice_bounds", lambda old, i, n: (old(i, n)[0], sympy.Integer(1))),
        MASKS | {"edits": ("strided_write", "columns_hidden")},
    ),
    "dropout": Mistake(
        lambda m: m.setattr("mpass.match.eager_weights.dropout_reason", lambda _p: ""),
        {"scores": ("dropout", "plain")},
    ),
    "the dtype of autocast": Mistake(
        lambda m: (
            m.setattr(rewrite, "insert_casts", lambda _graph, site: site),
            m.setattr(rewrite, "difference", lambda _old, _new: ""),
        ),
        {"scores": ("autocast", "sdpa"), "after": ("",)},
    ),
    "a scale lost": Mistake(
        lambda m: m.setattr(sdpa, "constant_scale", lambda _scale, _query: 0.25),
        {"scores": ("sdpa", "sdpa_scale")},
    ),
    "a negative factor after the mask": Mistake(
        replaced(eager_scores, "constant_factor", lambda old, *a: (f := old(*a)) and abs(f)),
        {"scores": ("flipped_after", "scaled_after", "plain")},
    ),
    "softmax over another dimension": Mistake(
        lambda m: m.setattr(eager, "is_softmax", lambda node: op_name(node) == "softmax"),
        {"scores": ("wrong_dim", "plain")},
    ),
    "weights that are changed or read twice": Mistake(
        replaced(eager, "trace_weights", lambda old, *a: (w := old(*a)) and unproblematic(w)),
        {"scores": ("double_softmax", "weights_twice", "dropout")},
    ),
    "writes that keep nothing alive": Mistake(
        unkept_writes, {"scores": ("sdpa", "plain"), "after": ("view_write", "foreach_zero")}
    ),
    "is_causal beside a mask": Mistake(
        mask_forgotten,
        MASKS | {"scores": ("sdpa", "sdpa_both"), "edits": ("window", "columns_hidden")},
    ),
    "casts of masks to integers": Mistake(
        replaced(values, "cast_number", lambda _old, value, _dtype: value),
        MASKS | {"edits": ("wrapping_cast", "cut_cast", "window")},
    ),
    "a mask that is reshaped in place": Mistake(
        replaced(mpass.graph.writes.StorageWrites, "reshaped", lambda *_: None),
        MASKS | {"edits": ("unsqueeze_", "window")},
    ),
    "nodes of functorch as dead code": Mistake(
        eagerly_dead,
        MASKS | {"edits": ("window",), "after": ("vmap",)},
        shows="^RuntimeError.*vmap",
    ),
    "writes without a reader as dead code": Mistake(
        eagerly_dead, MASKS | {"edits": ("window",), "after": ("view_write", "foreach_zero")}
    ),
}


def unproblematic(weights):
    return dataclasses.replace(weights, problem="")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if mistake.quick else [pytest.mark.slow])
        for name, mistake in MISTAKES.items()
    ],
)
def test_fuzzer_finds(name, monkeypatch):
    """With a mistake put back in, a program that is drawn computes something else."""
    mistake = MISTAKES[name]
    mistake.patch(monkeypatch)

    @settings(examples(100), phases=[Phase.generate], report_multiple_bugs=False)
    @given(drawn(**mistake.parts))
    def search(spec):
        found = wrong(spec)
        assert found == "", found

    with pytest.raises(AssertionError, match=mistake.shows):
        search()
