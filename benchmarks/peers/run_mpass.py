"""The worker of `backend="minference"`, in KINDS, and of Inductor alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.peers.protocol import serve
from mpass.models.load import load_model
from mpass.models.prefill import compile_body, continue_text, logits, predict, prefill

KINDS = {
    "default": ("minference", {}),
    "fp32": ("minference", {"linear": "fp32"}),
    "half": ("minference", {"linear": "half"}),
    "int8": ("minference", {"linear": "int8"}),
    "int8 scores": ("minference", {"attention": "int8"}),
    "half int8": ("minference", {"linear": "half", "attention": "int8"}),
    "all int8": ("minference", {"linear": "int8", "attention": "int8"}),
    "inductor": ("inductor", None),
}


class Compiled:
    """A compiled body of a model in bf16; prompts of another length compile anew."""

    def __init__(self, model: str, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, _ = load_model(model, dtype=torch.bfloat16)
        backend, options = KINDS[kind]
        self.forward = compile_body(self.model, backend, options, dynamic=False)
        self.version = f"torch {torch.__version__}"

    @torch.no_grad()
    def first_token(self, tokens: Sequence[int]) -> int:
        hidden = prefill(self.forward, torch.tensor([tokens])).last_hidden_state
        return int(logits(self.model, hidden[:, -1:]).argmax())

    @torch.no_grad()
    def continue_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        prompt = torch.tensor([tokens])
        output = prefill(self.forward, prompt)
        body = type(self.model.get_decoder()).forward.__get__(self.model.get_decoder())
        found = continue_text(self.model, body, output, prompt, count)
        return [int(token) for token in found.flatten()]

    @torch.no_grad()
    def loss(self, tokens: Sequence[int]) -> float | None:
        prompt = torch.tensor([tokens])
        found = predict(self.model, prefill(self.forward, prompt).last_hidden_state, prompt)
        return float(-found.log_likelihood.double().mean())


if __name__ == "__main__":
    name, chosen, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    serve(lambda: Compiled(name, chosen, count))
