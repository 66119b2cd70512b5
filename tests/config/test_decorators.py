"""Patterns where the model's code is: decorators and regions, down to the rewritten graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.config.sparse_config import builtin_default
from mpass.errors import MpassError, OptionValueError
from tests.helpers.toys import OPTIONS, Attention, Decoder, compile_toy, tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


ALWAYS = {"dense_above": 2.0}
"""Sparse even where that saves nothing, so that results can be compared."""


def stack(*layers: nn.Module) -> Decoder:
    model = Decoder(depth=0)
    model.layers.extend(layers)
    return model.eval()


@torch.no_grad()
def patterns_of(model, *, args=None, options=None) -> list[tuple[str, ...]]:
    """The patterns that each site of a freshly compiled model got; () where it stays dense."""
    torch._dynamo.reset()
    compile_toy(model, options)(*(args or (torch.randn(1, 300, 32),)))
    return [site.patterns for site in mpass.last_report().sites]


def shape(sink: int) -> mpass.AShape:
    return mpass.AShape(sink, 9)


def four(sink: int) -> tuple[str, ...]:
    return (str(shape(sink)),) * 4


DEFAULT = (str(builtin_default()),) * 4


@mpass.configure(pattern=mpass.AShape(1, 9))
class Decorated(Attention):
    pass


class Subclass(Decorated):
    pass


class OtherForward(Decorated):
    def forward(self, x):
        return Attention.forward(self, x) * 1.0


class OwnRegion(Decorated):
    def forward(self, x):
        with mpass.configure(pattern=mpass.AShape(2, 9)):
            return super().forward(x)


@mpass.configure(pattern=mpass.AShape(3, 9))
class Redecorated(OwnRegion):
    def forward(self, x):
        return Decorated.forward(self, x)


class OwnMethod(Attention):
    @mpass.configure(pattern=mpass.AShape(4, 9), heads=[0, 3])
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Attention, DEFAULT),
        (Decorated, four(1)),
        (Subclass, four(1)),
        (OtherForward, four(1)),
        (OwnRegion, four(2)),
        (Redecorated, four(3)),
        (OwnMethod, (str(shape(4)), *DEFAULT[1:3], str(shape(4)))),
    ],
)
@pytest.mark.parametrize("as_root", [False, True], ids=["inside", "compiled itself"])
def test_classes_subclasses_and_methods(cls, expected, as_root):
    model = cls() if as_root else stack(cls())
    assert patterns_of(model.eval()) == [expected]


def test_innermost_wins_between_models_layers_and_regions():
    @mpass.configure(pattern=shape(5), min_seq_len=10)
    class Model(Decoder):
        def forward(self, x):
            first, second, third = self.layers
            x = first(x)
            with mpass.configure(pattern=shape(6)):
                with mpass.configure(pattern="dense", heads="0-1"):
                    x = second(x)
                x = third(x)
            return x

    model = Model(depth=0)
    model.layers.extend([Attention(), Attention(), Decorated()])
    mixed = ("dense()", "dense()", *four(6)[2:])
    assert patterns_of(model.eval(), options={"pattern": shape(7), "min_seq_len": 5000}) == [
        four(5),
        mixed,
        four(1),
    ]


def test_layers_and_heads_select():
    @mpass.configure(pattern=[shape(1), "dense", shape(3), "dense"], layers="1-")
    @mpass.configure(pattern={"0-2": "a_shape", 3: shape(9)}, layers=[0, 2])
    class Selected(Attention):
        pass

    listed = (str(shape(1)), "dense()", str(shape(3)), "dense()")
    assert patterns_of(stack(Selected(), Selected(), Selected())) == [
        (*("a_shape(128, 1024)",) * 3, str(shape(9))),
        listed,
        listed,
    ]


def test_functions_that_call_attention():
    @mpass.configure(pattern=shape(1))
    def attend(query):
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    query = torch.randn(1, 4, 300, 8)
    assert patterns_of(attend, args=(query,)) == [four(1)]
    assert patterns_of(lambda q: attend(q) + 1, args=(query,)) == [four(1)]
    with torch.no_grad():
        expected = mpass.sparse_attention(query, query, query, pattern=shape(1))
        assert torch.allclose(compile_toy(attend, ALWAYS)(query), expected, atol=1e-5)
    assert torch.equal(attend(query), F.scaled_dot_product_attention(*[query] * 3, is_causal=True))


def test_patterns_made_inside_of_traced_code_keep_their_values():
    def attend(query, sink: int):
        with mpass.configure(pattern=[mpass.AShape(sink + 1, 9), mpass.VerticalSlash(7, 200)]):
            return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    query = torch.randn(1, 2, 300, 8)
    assert patterns_of(attend, args=(query, 4)) == [("a_shape(5, 9)", "vertical_slash(7, 200)")]


def test_the_same_settings_nested_again_are_the_innermost():
    def attend(query):
        with mpass.configure(pattern="dense", heads=0), mpass.configure(pattern="a_shape"):
            with mpass.configure(pattern="dense", heads=0):
                return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    assert patterns_of(attend, args=(torch.randn(1, 2, 300, 8),)) == [
        ("dense()", "a_shape(128, 1024)")
    ]


def test_a_slice_of_the_heads_names_its_offset():
    whole = [shape(head + 1) for head in range(8)]

    @mpass.configure(head_offset=4)
    class Slice(Attention):
        pass

    config = mpass.SparseConfig(layers={0: whole}, num_heads=8, num_kv_heads=4)
    second_half = tuple(str(shape(head + 1)) for head in range(4, 8))
    assert patterns_of(stack(Slice()), options={"config": config}) == [second_half]
    decorated = mpass.configure(pattern=whole)(type("Both", (Slice,), {}))
    assert patterns_of(stack(decorated())) == [second_half]
    too_far = mpass.configure(head_offset=6)(type("Far", (Attention,), {}))
    with pytest.raises(Exception, match=r"ConfigMismatchError.*from 6 on"):
        patterns_of(stack(too_far()), options={"config": config})


def test_a_list_of_the_wrong_length_is_refused():
    wrong = mpass.configure(pattern=["dense"] * 3)(type("Wrong", (Attention,), {}))
    with pytest.raises(Exception, match=r"ConfigMismatchError.*configure on Wrong has 4"):
        patterns_of(stack(wrong()))


@torch.no_grad()
def test_two_models_in_one_process_keep_their_own():
    first, second = stack(Decorated()), stack(OwnRegion())
    plain, x = stack(Attention()), torch.randn(1, 300, 32)
    compiled = [compile_toy(model, ALWAYS) for model in (first, second, plain)]
    seen = []
    for model in compiled:
        model(x)
        seen.append(mpass.last_report().sites[0].patterns)
    assert seen == [four(1), four(2), DEFAULT]
    count = len(mpass.reports())
    for model, source in zip(compiled, (first, second, plain), strict=True):
        layer = source.layers[0]
        heads = layer.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        query, key, value = heads.split([4, 2, 2], dim=1)
        sink = {first: 1, second: 2}.get(source)
        pattern = mpass.VerticalSlash() if sink is None else shape(sink)
        out = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
        expected = x + layer.out(out.transpose(1, 2).flatten(2))
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert len(mpass.reports()) == count


class Numbered(nn.Module):
    """A block that knows its layer, as models of transformers do."""

    def __init__(self, number: int, cls: type[nn.Module] = Attention):
        super().__init__()
        self.attention = cls()
        self.attention.layer_idx = number

    def forward(self, x):
        return x + self.attention(x)


@torch.no_grad()
def compile_blocks(blocks: list[nn.Module], options: dict) -> list[mpass.report.SiteReport]:
    x, before = torch.randn(1, 300, 32), len(mpass.reports())
    for block in blocks:
        block.compile(backend="minference", fullgraph=True, options=OPTIONS | options)
    for block in blocks:
        block(x)
    return [report.sites[0] for report in mpass.reports()[before:]]


def test_regional_compilation_gives_each_layer_its_own_patterns():
    config = mpass.SparseConfig("a_shape", {i: shape(i + 1) for i in range(3)}, num_layers=3)
    sites = compile_blocks([Numbered(i).eval() for i in range(3)], {"config": config})
    assert [(site.layer, site.patterns) for site in sites] == [(i, four(i + 1)) for i in range(3)]


def test_regional_compilation_with_decorators_by_layer():
    cls = mpass.configure(pattern=shape(1), layers="1-")(type("Later", (Attention,), {}))
    sites = compile_blocks([Numbered(i, cls).eval() for i in range(3)], {})
    assert [(site.layer, site.patterns) for site in sites] == [
        (0, DEFAULT),
        (1, four(1)),
        (2, four(1)),
    ]


def test_regional_compilation_shares_one_graph_when_layers_do_not_matter():
    sites = compile_blocks([Numbered(i).eval() for i in range(3)], {"pattern": shape(1)})
    assert [site.patterns for site in sites] == [four(1)]


@torch.no_grad()
def test_transformers_layers_compiled_one_by_one():
    model = tiny_llama(num_hidden_layers=3)
    sparse = mpass.SparseConfig("dense", {i: shape(i + 1) for i in range(3)}, num_layers=3)
    before = len(mpass.reports())
    for layer in model.model.layers:
        layer.compile(backend="minference", fullgraph=True, options=OPTIONS | {"config": sparse})
    model(torch.arange(200)[None] % 32)
    sites = [site for report in mpass.reports()[before:] for site in report.sites]
    assert [(site.layer, site.patterns) for site in sites] == [(i, four(i + 1)) for i in range(3)]


@torch.no_grad()
def test_a_graph_break_around_a_decorated_layer_does_not_lose_it():
    class Breaking(Decoder):
        def forward(self, x):
            for layer in self.layers:
                torch._dynamo.graph_break()
                x = x + layer(x)
            return x

    model = Breaking(depth=0)
    model.layers.extend([Decorated(), OwnRegion()])
    before = len(mpass.reports())
    torch.compile(model.eval(), backend="minference", options=OPTIONS)(torch.randn(1, 300, 32))
    sites = [site for report in mpass.reports()[before:] for site in report.sites]
    assert [site.patterns for site in sites] == [four(1), four(2)]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, OptionValueError),
        ({"pattern": "nope"}, MpassError),
        ({"pattern": 7}, OptionValueError),
        ({"pattern": "dense", "layers": "x"}, OptionValueError),
        ({"pattern": "dense", "layers": -1}, OptionValueError),
        ({"pattern": "dense", "heads": "2-"}, OptionValueError),
        ({"pattern": "dense", "heads": [1, 1]}, OptionValueError),
        ({"pattern": "dense", "heads": []}, OptionValueError),
        ({"pattern": ["dense"], "heads": [0, 1]}, OptionValueError),
        ({"pattern": {0: "dense"}, "heads": 0}, OptionValueError),
        ({"min_seq_len": -1}, OptionValueError),
        ({"min_seq_len": 1.5}, OptionValueError),
        ({"head_offset": -1}, OptionValueError),
        ({"head_offset": True}, OptionValueError),
    ],
)
def test_nonsense_is_refused_where_it_is_written(settings, error):
    with pytest.raises(error):
        mpass.configure(**settings)


def test_only_modules_and_functions_can_be_decorated():
    for target in (int, 3, Attention()):
        with pytest.raises(OptionValueError, match=r"nn\.Module class or a function"):
            mpass.configure(pattern="dense")(target)


def test_nonsense_in_traced_code_names_itself():
    def attend(query):
        with mpass.configure(pattern="denes"):
            return F.scaled_dot_product_attention(query, query, query, is_causal=True)

    with pytest.raises(Exception, match=r"UnknownPatternError.*did you mean 'dense'"):
        patterns_of(attend, args=(torch.randn(1, 2, 300, 8),))
