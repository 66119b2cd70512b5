"""Graphs in the order of tiles: outputs in the tokens' own order, and the cells of the tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import mpass
from mpass.errors import ConfigFileError, GridError
from mpass.lowering.tiles import Grid, tile_order_of
from mpass.warm_up import fake_layer
from tests.helpers.toys import Attention, Decoder, RecordingBackend
from tests.helpers.truth import dense_attention, random_attention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner_backend": "eager", "min_seq_len": 64, "dense_above": 2.0}
EVERY_KEY = "block_sparse(1000)"


def both_ways(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def compiled(function, **options):
    return torch.compile(function, backend="minference", options=OPTIONS | options)


def padded(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, -37:] = False
    return mask


@pytest.mark.parametrize("hidden", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("grid", "tiles"),
    [
        ((16, 16), Grid((16, 16), 0, 0, (8, 8))),
        (mpass.Grid((17, 13), prefix=3, suffix=2), Grid((17, 13), 3, 2, (8, 8))),
        (mpass.Grid((5, 9, 6), suffix=20), Grid((5, 9, 6), 0, 20, (4, 4, 4))),
        ("square", Grid((15, 15), 1, 0, (8, 8))),
    ],
    ids=str,
)
def test_what_is_computed_is_attention_over_the_cells_of_the_tiles(grid, tiles, hidden):
    order = tile_order_of(tiles, torch.device("cpu"))
    length = len(order)
    q, k, v = random_attention(2, 4, 2, length)
    mask = padded(2, length) if hidden else None
    four = None if mask is None else mask[:, None, None]
    function = compiled(both_ways, pattern="block_sparse(2)", grid=grid)
    out = function(q, k, v) if four is None else function(q, k, v, four)
    (site,) = mpass.last_report().sites
    assert site.status == "sparse" and site.grid == str(tiles)
    key_mask = None if mask is None else mask[:, order]
    given = {"pattern": "block_sparse(2)", "is_causal": False, "key_mask": key_mask}
    cells = mpass.computed_mask(q[:, :, order], k[:, :, order], **given)
    assert not cells.all()
    back = torch.argsort(order)
    cells = cells[:, :, back][:, :, :, back]
    assert (out - dense_attention(q, k, v, cells, 32**-0.5)).abs().max() < 1e-5
    assert out.stride() == both_ways(q, k, v).stride()


def test_a_query_of_a_tile_sees_its_tile():
    """The tile is told by arithmetic of its own, and not by the order that is tested."""
    q, k, v = random_attention(1, 2, 2, 256)
    out = compiled(both_ways, pattern="a_shape(0, 1)", grid=(16, 16))(q, k, v)
    place = torch.arange(256)
    tile = place // 16 // 8 * 2 + place % 16 // 8
    cells = (tile[:, None] == tile).expand(1, 2, 256, 256)
    assert (out - dense_attention(q, k, v, cells, 32**-0.5)).abs().max() < 1e-5


class BothWays(Attention):
    """Attention of a toy in which every token sees every other."""

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        y = both_ways(*heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1))
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("more", [{}, {"summaries": 16}, {"denoising": True}], ids=str)
@torch.no_grad()
def test_layers_share_the_order_and_a_layer_may_have_its_own(more):
    model = Decoder(depth=0).eval()
    model.layers.extend(BothWays() for _ in range(3))
    x = torch.randn(2, 260, 32)
    own = mpass.LayerConfig(grid=mpass.Grid((13, 20), prefix=0))
    config = mpass.SparseConfig.from_json(mpass.SparseConfig(EVERY_KEY, {1: own}).to_json())
    given = {"config": config, "grid": mpass.Grid("square", 4), "dense_above": 2.0}
    backend = RecordingBackend(**given, **more)
    out = torch.compile(model, backend=backend)(x)
    assert backend.count("tile_order") == 2
    assert backend.count("index_select") == 3 * 4
    assert (out - model(x)).abs().max() < 1e-5


def test_all_keys_in_the_order_of_tiles_are_dense_attention_at_each_size_of_a_picture():
    function = compiled(both_ways, pattern=EVERY_KEY, grid="square")
    for side in (9, 12, 15):
        q, k, v = random_attention(1, 4, 2, side * side + 1)
        expected = both_ways(q.double(), k.double(), v.double())
        assert (function(q, k, v) - expected).abs().max() < 1e-5
    grids = [report.sites[0].grid for report in mpass.reports()[-2:]]
    assert grids == ["9 x 9 in tiles of 8 x 8", "square in tiles of 8 x 8"]
    with pytest.raises(GridError, match=r"164 tokens.*up to 16 before 12 x 12"):
        function(*random_attention(1, 4, 2, 12 * 12 + 20))


def test_gradients_come_back_to_their_tokens():
    leaves = [t.requires_grad_() for t in random_attention(1, 4, 2, 150)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(1, 4, 150, 32)
    options = {"pattern": EVERY_KEY, "training": "sparse", "grid": (10, 15)}
    out = compiled(both_ways, **options)(*leaves)
    assert mpass.last_report().sites[0].training
    found = torch.autograd.grad((out * weights).sum(), leaves)
    expected = torch.autograd.grad((both_ways(*doubles) * weights).sum(), doubles)
    for got, true in zip(found, expected, strict=True):
        assert (got - true).norm() < 1e-5 * true.norm()


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_causal_attention_and_other_tokens_keep_their_order():
    """A grid of the options is for the pictures of a model that has text as well."""
    q, k, v = random_attention(1, 4, 2, 150)
    plain = compiled(causal, pattern="block_sparse(1)")(q, k, v)
    assert torch.equal(compiled(causal, pattern="block_sparse(1)", grid=(10, 15))(q, k, v), plain)
    assert mpass.last_report().sites[0].grid == ""
    _, k, v = random_attention(1, 4, 2, 200)
    out = compiled(both_ways, pattern=EVERY_KEY, grid=(10, 15))(q, k, v)
    assert mpass.last_report().sites[0].status == "sparse"
    assert mpass.last_report().sites[0].grid == ""
    assert (out - both_ways(q.double(), k.double(), v.double())).abs().max() < 1e-5


@mpass.configure(grid=mpass.Grid((10, 15), prefix=0), pattern=EVERY_KEY)
def decorated(q, k, v):
    return both_ways(q, k, v)


@mpass.configure(grid=(10, 15), pattern=EVERY_KEY)
def decorated_causal(q, k, v):
    return causal(q, k, v)


def region(q, k, v):
    with mpass.configure(grid="square", pattern=EVERY_KEY):
        return both_ways(q, k, v)


def test_decorators_say_grids():
    for function, length, shape in ((decorated, 150, "10 x 15"), (region, 145, "12 x 12")):
        q, k, v = random_attention(1, 4, 2, length)
        out = compiled(function)(q, k, v)
        assert mpass.last_report().sites[0].grid == f"{shape} in tiles of 8 x 8"
        assert (out - both_ways(q.double(), k.double(), v.double())).abs().max() < 1e-5


def test_what_a_grid_cannot_be_is_told_where_it_is_given():
    q, k, v = random_attention(1, 4, 2, 150)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)GridError.*causal.*decorated_causal"):
        compiled(decorated_causal)(q, k, v)
    with pytest.raises(
        BackendCompilerFailed, match=r"(?s)GridError.*has 150 tokens.*10 x 10 patches"
    ):
        compiled(both_ways, pattern=EVERY_KEY, grid=(10, 10))(q, k, v)
    text = mpass.SparseConfig("dense", {0: mpass.LayerConfig(grid=(3, 3))}).to_json()
    with pytest.raises(ConfigFileError, match=r"layers\['0'\].*grid"):
        mpass.SparseConfig.from_json(text.replace("[3, 3]", "[3]"))


def test_kernels_are_foreseen_for_the_tensors_that_they_get(monkeypatch):
    """On GPUs the strides decide what is built."""
    layers, seen = [], []

    def watched(plans):
        layers.extend(map(fake_layer, plans))

    def keep(query, key, value, *rest):
        seen.append([t.stride() for t in (query, key, value)])
        return original(query, key, value, *rest)

    from mpass.lowering import ops

    original = ops.over_index
    monkeypatch.setattr("mpass.backend.start_kernels", watched)
    monkeypatch.setattr(ops, "over_index", keep)
    q, k, v = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in random_attention(1, 4, 2, 150)
    )
    compiled(both_ways, pattern="block_sparse(1)", grid=(10, 15))(q, k, v)
    (layer,) = layers
    assert [layer.query.stride, layer.key.stride, layer.value.stride] == seen[-1]
