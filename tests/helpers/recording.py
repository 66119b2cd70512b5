"""Running captured graphs beside what the matchers claim about them.

`record` compiles a function with a backend that finds every attention, runs the graph as it was
captured, and computes each proven site again in fp64 from what the site claims: its query, key,
value, scale, softcap, sinks and the meaning of its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.lowering.index import AttentionMask
from mpass.lowering.key_bias import as_rows
from mpass.lowering.reference.attention import allowed_cells, masked_softmax, repeat_kv
from mpass.match import find_attention, inline_subgraphs

FINITE = -9000.0
"""A number that hides a key where it is added to its score, or a smaller one."""


@dataclass(frozen=True)
class Record:
    """One attention of a run: what was claimed, what the graph computed, what the claim gives.

    real, claimed: outputs [B, H, Nq, Dv]; visible [B, H, Nq, Nk] of the claim; mask: the real mask
    tensor as the graph built it, if there is one. All but `real` are None for unproven sites.
    """

    site: AttentionSite
    real: Tensor
    claimed: Tensor | None = None
    visible: Tensor | None = None
    mask: Tensor | None = None

    @property
    def proven(self) -> bool:
        return self.claimed is not None

    def error(self) -> float:
        """Largest difference of the claim to the graph, over the rows that see something."""
        assert self.claimed is not None and self.visible is not None
        rows = self.visible.any(-1)
        difference = (self.real.double() - self.claimed).abs()[rows.expand(self.real.shape[:-1])]
        return float(difference.max()) if difference.numel() else 0.0

    def wrong_cells(self) -> int:
        """Cells in which the claim differs from the mask tensor that the graph built."""
        assert self.visible is not None
        if self.mask is None:
            return 0
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > FINITE
        visible, seen = torch.broadcast_tensors(self.visible, seen)
        return int((visible != seen).sum())


class Watching(fx.Interpreter):
    """Runs a graph; keeps what each site's tensors hold when its output is computed."""

    def __init__(self, gm: fx.GraphModule, sites: list[AttentionSite]) -> None:
        super().__init__(gm)
        self.garbage_collect_values = False
        self.sites = {site.output: site for site in sites}
        self.values: dict[fx.Node, dict[fx.Node, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        site = self.sites.get(n)
        if site is None:
            return super().run_node(n)
        inputs = [node for node in nodes_of(site) if node in self.env]
        values = {node: self.env[node].detach().clone() for node in inputs}
        value = super().run_node(n)
        output = value[0] if isinstance(value, tuple) else value
        self.values[n] = {**values, n: output.detach().clone()}
        return value


def record(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any):
    """Compile and run a function; the records of its attentions and the function's result."""
    records: list[Record] = []

    def backend(gm: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        inline_subgraphs(gm)
        sites = find_attention(gm)
        gm.graph.lint()

        def run(*values: Any) -> Any:
            watching = Watching(gm, sites)
            result = watching.run(*values)
            records.extend(
                compare(site, watching.values[site.output])
                for site in sites
                if site.output in watching.values
            )
            return result

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return records, result


def nodes_of(site: AttentionSite) -> list[fx.Node]:
    """The nodes whose values a comparison needs."""
    nodes = [site.query, site.key, site.value, site.sinks, site.key_bias]
    if site.mask is not None:
        nodes.append(site.mask.key_mask)
    return [node for node in (*nodes, *sdpa_mask(site)) if node is not None]


def compare(site: AttentionSite, values: dict[fx.Node, Tensor]) -> Record:
    """What a site computes by its claim, from the values of one run."""
    real = values[site.output]
    if site.output_transposed:
        real = real.transpose(1, 2)
    if site.mask is None or site.dense_reason or isinstance(site.mask.query_offset, fx.Node):
        return Record(site, real)
    query, key, value = (values[node].double() for node in (site.query, site.key, site.value))
    visible = claimed_cells(site.mask, values, query.shape[2], key.shape[2])
    heads = query.shape[1]
    scores = query @ repeat_kv(key, heads).transpose(-1, -2) * site.scale
    if site.softcap > 0:
        scores = site.softcap * torch.tanh(scores / site.softcap)
    sinks = None if site.sinks is None else values[site.sinks]
    hidden: Tensor | bool = False
    if site.key_bias is not None:
        bias = as_rows(values[site.key_bias], query.shape[0], heads)[:, :, None].double()
        bias = bias * site.bias_factor
        scores, hidden = scores + bias, bias <= FINITE
    claimed = masked_softmax(scores, visible, sinks) @ repeat_kv(value, heads)
    if isinstance(hidden, Tensor):  # such a bias hides keys, as a finite number in a mask does
        visible = visible & ~hidden
    mask = next((values[node] for node in sdpa_mask(site)), None)
    return Record(site, real, claimed, visible, mask)


def sdpa_mask(site: AttentionSite) -> list[Any]:
    """The mask argument of an SDPA call, as a list of at most one."""
    if site.spelling != "sdpa":
        return []
    arguments = [site.output.kwargs.get("attn_mask"), *site.output.args[3:4]]
    return [node for node in arguments if isinstance(node, fx.Node)]


def claimed_cells(
    meaning: MaskMeaning, values: dict[fx.Node, Tensor], num_queries: int, num_keys: int
) -> Tensor:
    """The cells that a meaning lets be seen, bool [B or 1, 1, Nq, Nk]."""
    offset = number(meaning.query_offset)
    key_mask = None if meaning.key_mask is None else values[meaning.key_mask]
    mask = AttentionMask(meaning.causal, offset, meaning.window, key_mask)
    visible = allowed_cells(mask, torch.arange(offset, offset + num_queries), num_keys)
    if meaning.valid_keys is not None:
        visible = visible & (torch.arange(num_keys) < number(meaning.valid_keys))
    return visible


def number(length: Any) -> int:
    """A length in the call that was compiled."""
    return int(length.node.hint) if isinstance(length, torch.SymInt) else int(length)
