"""What was tried on the attention that follows an index: loss and work on a real model.

    python benchmarks/attention_trials.py --texts alice

    selected      the attention over what `--pattern` selects, as it is
    virtual_keys  mean correction: of each pruned block that a query block sees whole, the keys that
                  are no columns enter as one key: mean key, mean value, logit + log of their number
    skipped       tiles of 64 x 64 left out whose greatest weight is below `--least` of the greatest
                  of each of their rows, as a kernel could find on its way
    value_norms   the index from scores that have the log of a run's mean value norm added

In plain torch, all heads of all layers, so that a text of 8192 tokens takes minutes; what it saves
is told in cells, not in seconds. One JSON line per trial and text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import union_trials
from frontier import dense_states, rounded
from run_summaries import Vectors
from torch import Tensor

from mpass.config.pattern_text import parse_pattern
from mpass.evaluate.environment import describe_environment
from mpass.evaluate.score import compare_all
from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.pooled_keys import pooled_keys
from mpass.models.load import load_model, parse_dtype
from mpass.models.prefill import prefill
from mpass.models.texts import find_text, load_tokens
from mpass.patterns.union import Union

OUTPUT = Path(__file__).parent / "results" / "attention_trials.jsonl"
TRIALS = ("selected", "virtual_keys", "skipped", "value_norms")
ROWS = 8 * BLOCK
"""Query rows whose scores exist at the same time."""

NAME = "attention_trial"
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclasses.dataclass
class Trial:
    """One way to attend, and how many cells it computed of those that causal attention has."""

    name: str
    pattern: Union
    least: float
    computed: float = 0.0
    total: float = 0.0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention [1, H, N, D] of queries [1, H, N, D], keys and values [1, Hk, N, D]."""
        mask, length = AttentionMask(), query.shape[2]
        index = self.index(query, key, value, mask, scale)
        columns = reference.selected_columns(index, 1, length)[0]
        group = query.shape[1] // key.shape[1]
        keys, values = (x[0].float().repeat_interleave(group, 0) for x in (key, value))
        out = torch.empty_like(query)
        for start in range(0, length, ROWS):
            rows = slice(start, min(length, start + ROWS))
            stop = rows.stop
            cells = reference.visible_rows(index, mask, rows, batch=1, num_keys=length)[0]
            cells, own = cells[..., :stop], columns[:, :stop]
            scores = query[0, :, rows].float() @ keys[:, :stop].mT * scale
            scores = scores.masked_fill(~cells, -torch.inf)
            if self.name == "skipped":
                cells = cells & ~self.light_tiles(scores, own)
                scores = scores.masked_fill(~cells, -torch.inf)
            seen = values[:, :stop]
            if self.name == "virtual_keys":
                more, mean_values = self.virtual(query[0, :, rows], keys, values, cells, own, scale)
                scores, seen = torch.cat([scores, more], -1), torch.cat([seen, mean_values], 1)
            out[0, :, rows] = (scores.softmax(-1) @ seen).to(out.dtype)
            self.computed += float(cells.sum())
            self.total += cells.shape[0] * sum(range(start + 1, stop + 1))
        return out

    def index(
        self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, scale: float
    ) -> SparseIndex:
        heads = range(query.shape[1])
        if self.name != "value_norms":
            return Union.estimate(
                EstimateInputs(query, key, mask, heads, scale), [self.pattern] * len(heads)
            )

        def weighed(own: Tensor, keys: Tensor, mask: AttentionMask, rule: Any) -> list[Vectors]:
            """Runs weigh as many keys as their mean value norm says: its log joins the logit."""
            kv_head = next(i for i in range(key.shape[1]) if torch.equal(key[:, i], keys))
            norms = value[:, kv_head].float().norm(dim=-1, keepdim=True)
            mean_norms, _ = pooled_keys(norms, mask, rule.pool)
            means, counts = pooled_keys(keys, mask, rule.pool)
            return [(own.float(), means, counts * mean_norms[..., 0])]

        names = {field.name for field in dataclasses.fields(union_trials.TrialRule)}
        fields = {n: v for n, v in self.pattern.parameters().items() if n in names}
        rule = union_trials.TrialRule(
            "weighed", dims=0, base=1.0, shared=False, decay=1.0, **fields
        )
        return union_trials.trial_index(
            EstimateInputs(query, key, mask, heads, scale),
            [rule] * len(heads),
            summaries={"weighed": weighed},
        )

    def light_tiles(self, scores: Tensor, columns: Tensor) -> Tensor:
        """Cells [H, R, n] of blocks that no row of a tile gives `least` of its greatest weight."""
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        blocks = weights.masked_fill(columns[:, None], 0.0)
        tiles = blocks.unflatten(1, (-1, BLOCK)).unflatten(-1, (-1, BLOCK)).amax((2, 4))
        light = (tiles < self.least).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return light & ~columns[:, None]

    @staticmethod
    def virtual(
        query: Tensor, keys: Tensor, values: Tensor, cells: Tensor, columns: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Logits [H, R, J] and values [H, J, D] of the virtual keys; -inf for blocks that are kept.

        query [H, R, D]; cells [H, R, n] of which columns [H, n] are vertical columns.
        """
        rest = (~columns).float()[..., None].unflatten(1, (-1, BLOCK))
        sizes = rest.sum(2)
        stop = columns.shape[1]
        mean_keys, mean_values = (
            (x[:, :stop].unflatten(1, (-1, BLOCK)) * rest).sum(2) / sizes.clamp(min=1)
            for x in (keys, values)
        )
        logits = query.float() @ mean_keys.mT * scale + sizes[..., 0].log()[:, None]
        kept = (cells & ~columns[:, None]).unflatten(-1, (-1, BLOCK)).any(-1)
        kept = kept.unflatten(1, (-1, BLOCK)).any(2).repeat_interleave(BLOCK, 1)
        first = stop - query.shape[1]
        blocks = torch.arange(stop // BLOCK)
        whole = (first + torch.arange(query.shape[1])) // BLOCK
        seen = blocks < whole[:, None]
        return logits.masked_fill(kept | ~seen, -torch.inf), mean_values


def run_trial(model: Any, trial: Trial, tokens: Tensor) -> Tensor:
    """Last hidden states of a prefill whose attention is the trial's."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **words: Any
    ) -> Any:
        out = trial.attend(query, key, value, words["scaling"])
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
    hidden: Tensor = prefill(model.get_decoder().forward, tokens).last_hidden_state
    model.set_attn_implementation("sdpa")
    return hidden


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="all layers causal, without windows")
    parser.add_argument("--texts", nargs="+", default=["alice"])
    parser.add_argument("--length", type=int, default=8192, help="a multiple of 64")
    parser.add_argument("--trials", nargs="+", default=TRIALS, choices=TRIALS)
    parser.add_argument("--pattern", default="union", help="union with any parameters")
    parser.add_argument("--least", type=float, default=0.01, help="of a row's greatest weight")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model, dtype=parse_dtype(arguments.dtype))
    print("| text | trial | density | loss | last quarter |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for text in arguments.texts:
        tokens = load_tokens(find_text(text).read(), tokenizer, arguments.length)
        dense, _ = dense_states(model, arguments.model, tokens)
        for name in arguments.trials:
            trial = Trial(name, parse_pattern(arguments.pattern), arguments.least)
            hidden = run_trial(model, trial, tokens)
            losses = compare_all(model, dense, [hidden], tokens)[0]
            words = {"model": arguments.model, "text": text, "length": arguments.length}
            words |= {"trial": name, "pattern": arguments.pattern, "least": arguments.least}
            figures = {"density": trial.computed / trial.total} | dataclasses.asdict(losses)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps(words | rounded(figures) | {"versions": describe_environment()})
                    + "\n"
                )
            loss = losses.sparse - losses.dense
            last = losses.sparse_quarters[-1] - losses.dense_quarters[-1]
            cells = f"{text} | {name} | {figures['density']:.1%} | {loss:+.4f} | {last:+.4f}"
            print(f"| {cells} |", flush=True)


if __name__ == "__main__":
    main()
