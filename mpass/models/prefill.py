"""A causal language model's prefill, compiled by any backend, and what its output is worth.

The model's body is compiled, not the whole: its last hidden states [1, N, hidden] serve both the
next token and, a chunk of positions at a time, the perplexity. Logits of all positions at once
would be 1.6 GB in fp32 at 8192 tokens and a vocabulary of 49152.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Positions whose logits exist at the same time."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says about each next token of a text of N tokens.

    log_likelihood: of the token that follows, natural logarithm, fp32 [N - 1];
    top_token: the most likely next token, int64 [N].
    """

    log_likelihood: Tensor
    top_token: Tensor

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per token."""
        return float((-self.log_likelihood.double().mean()).exp())


def compile_body(
    model: Any,
    backend: str,
    options: dict[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """`forward` of the model's body (embedding and layers, without lm_head), compiled."""
    compiled: Callable[..., Any] = torch.compile(
        model.get_decoder().forward, backend=backend, options=options, dynamic=dynamic
    )
    return compiled


@contextlib.contextmanager
def body_forward(model: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the model, and so its `generate`, run `forward` as its body."""
    body = model.get_decoder()
    body.forward = forward
    try:
        yield
    finally:
        del body.forward  # the class's own shows again


@torch.no_grad()
def prefill(forward: Callable[..., Any], tokens: Tensor) -> Any:
    """The body's output for a prompt [1, N]: last_hidden_state [1, N, hidden], past_key_values."""
    return forward(input_ids=tokens, use_cache=True)


@torch.no_grad()
def timed_prefill(model: Any, forward: Callable[..., Any], tokens: Tensor) -> float:
    """Seconds from the prompt [1, N] to the first generated token, key-value cache filled."""
    synchronize(tokens)
    start = time.perf_counter()
    hidden = prefill(forward, tokens).last_hidden_state
    int(logits(model, hidden[:, -1:]).argmax())  # reading the number waits for the device
    return time.perf_counter() - start


def synchronize(tensor: Tensor) -> None:
    """Wait until the device of `tensor` has nothing left to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Scores of all tokens, fp32: hidden [..., hidden] -> [..., vocabulary]."""
    scores: Tensor = model.get_output_embeddings()(hidden).float()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@torch.no_grad()
def predict(model: Any, hidden: Tensor, tokens: Tensor) -> Predictions:
    """Judge the body's last hidden states [1, N, hidden] of a text [1, N], chunk by chunk."""
    likelihoods, tops = [], []
    length = tokens.shape[1]
    for start in range(0, length, CHUNK):
        scores = logits(model, hidden[0, start : start + CHUNK])
        tops.append(scores.argmax(-1))
        following = tokens[0, start + 1 : start + 1 + CHUNK]
        known = scores[: len(following)].log_softmax(-1)
        likelihoods.append(known.gather(-1, following[:, None])[:, 0])
    return Predictions(torch.cat(likelihoods).cpu(), torch.cat(tops).cpu())


@torch.no_grad()
def continue_text(
    model: Any, forward: Callable[..., Any], output: Any, tokens: Tensor, count: int
) -> Tensor:
    """Greedy tokens [count] (fewer at an end of text) after a prompt whose prefill gave `output`.

    `generate` goes on from the prefill's key-value cache: it runs decode steps alone.
    """
    first = logits(model, output.last_hidden_state[:, -1:])[:, -1].argmax(-1, keepdim=True)
    if count <= 1:
        return first[0, :count].cpu()
    prompt = torch.cat([tokens, first], dim=1)
    # transformers 5.24 renamed the argument, and warns of the old name.
    known = inspect.signature(type(model).forward).parameters
    cache = {"cache" if "cache" in known else "past_key_values": output.past_key_values}
    with body_forward(model, forward):
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache,
            max_new_tokens=count - 1,
            do_sample=False,
        )
    return whole[0, tokens.shape[1] :].cpu()
