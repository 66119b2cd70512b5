"""What users call, on the device: attention as a function, compiled models, graphs.

Patterns select every key here, so that fp64 dense attention over the mask is the truth, or the
model's own eager attention where the models round their weights. `check.py` has the kernels one by
one; these checks are of everything between them and the user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import mpass
from benchmarks.gpu.check import TOLERANCE, relative_error
from benchmarks.gpu.setting import Row, Setting, Work
from mpass.lowering.recorder import record

EVERY_KEY = (
    "vertical_slash(1, 1048576)",
    "block_sparse(1048576)",
    "a_shape(64, 1048576)",
    "union(mass=1.0)",
)
"""Patterns that select every key, in every form of an index: heads take them in turn."""

LENGTH = 700

MODEL_ERROR = 2e-2
"""Largest norm of the difference of logits in bf16 over the norm of the eager ones, which are
rounded as often."""

Mask = Callable[[Tensor, Tensor], Tensor]


def calls(setting: Setting) -> Iterator[Work]:
    """Checks by name."""
    for name, more in FUNCTIONS.items():
        yield f"check/call attend, {name}/{LENGTH}", functools.partial(attend, setting, more)
    for name, scenario in SCENARIOS.items():
        for kind in MODELS:
            work = functools.partial(scenario, setting, kind)
            yield f"check/call {kind}, {name}/{LENGTH}", work


FUNCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 150},
    "offset": {"query_offset": 190},
    "softcap": {"softcap": 15.0},
    "sinks": {"sinks": True},
    "padding": {"key_mask": True},
    "bias per key": {"key_bias": True},
}


def attend(setting: Setting, more: dict[str, Any]) -> Row:
    """`mpass.attend` with log-sum-exps against fp64 dense attention."""
    generator = torch.Generator(setting.device).manual_seed(7)
    batch, heads, kv_heads, dim = 2, 8, 4, 32 if setting.smoke else 128
    dtype = torch.float32 if setting.smoke else torch.bfloat16
    num_keys = LENGTH + more.get("query_offset", 0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=setting.device)

    query = normal(batch, heads, LENGTH, dim).to(dtype)
    key, value = (normal(batch, kv_heads, num_keys, dim).to(dtype) for _ in range(2))
    given = dict(more)
    if "sinks" in more:
        given["sinks"] = normal(heads)
    if "key_bias" in more:
        given["key_bias"] = normal(1, heads, num_keys)
    if "key_mask" in more:
        given["key_mask"] = torch.arange(num_keys, device=setting.device) < num_keys - 90
        given["key_mask"] = given["key_mask"].expand(batch, -1).contiguous()
    patterns = [EVERY_KEY[head % len(EVERY_KEY)] for head in range(heads)]
    out, lse = mpass.attend(
        query, key, value, patterns=patterns, dense_above=1.0, return_lse=True, **given
    )
    truth, sums = dense_in_full(query, key, value, **given)
    error = max(relative_error(out, truth), float((lse.double() - sums).abs().max()) / 10)
    return {"error": error, "ok": error < TOLERANCE[dtype]}


def dense_in_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 0,
    query_offset: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense causal attention [B, H, Nq, Dv] in fp64 and its log-sum-exps, of a window and more."""
    group = query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    if key_bias is not None:
        scores = scores + key_bias[:, :, None].double()
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(query.shape[2], device=query.device)[:, None] + query_offset
    columns = torch.arange(key.shape[2], device=query.device)
    seen = columns <= rows
    if window:
        seen = seen & (rows - columns < window)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    sums = scores.logsumexp(-1)
    if sinks is not None:
        sums = torch.logaddexp(sums, sinks.double()[None, :, None])
    return (scores - sums[..., None]).exp() @ values, sums


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 100, "head_dim": 64}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": 100,
            "head_dim": 64,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
        },
    ),
}
"""Causal attention alone; with windows and softcaps; with windows and sinks."""

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(setting: Setting, kind: str, implementation: str = "eager") -> Any:
    """A small model with random weights on the device."""
    import transformers

    config, more = MODELS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES | more)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=implementation)
    dtype = torch.float32 if setting.smoke else torch.bfloat16
    return model.to(setting.device, dtype).eval().requires_grad_(False)


def compiled(setting: Setting, kind: str, **more: Any) -> Any:
    """The same model, compiled with patterns that select every key."""
    torch._dynamo.reset()
    model = build(setting, kind, "sdpa" if kind == "llama" else "eager")
    options: dict[str, Any] = {"pattern": EVERY_KEY[0], "dense_above": 2.0, "min_seq_len": 32}
    return mpass.compile(model, **{"inner_backend": "eager"} | options | more)


def tokens(setting: Setting, count: int = LENGTH, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 512, (batch, count), generator=generator).to(setting.device)


def compare(own: Tensor, right: Tensor, calls: list[Any]) -> Row:
    """The row of a model's logits [B, N, V]: their relative error, and what ran."""
    difference = torch.linalg.vector_norm(own.double() - right.double())
    error = float(difference / torch.linalg.vector_norm(right.double()))
    ran = sorted({call.lowering for call in calls})
    good = error < MODEL_ERROR and bool(ran) and "dense" not in ran
    return {"error": error, "ran": ran, "ok": good}


def whole_prompt(setting: Setting, kind: str, **more: Any) -> Row:
    """A prompt at once."""
    text = tokens(setting)
    right = build(setting, kind)(text).logits
    model = compiled(setting, kind, **more)
    with record() as log:
        own = model(text).logits
    return compare(own, right, log.calls)


def measured(setting: Setting, kind: str) -> Row:
    """A prompt whose losses are measured while it runs."""
    return whole_prompt(setting, kind, measure=True)


def padded_batch(setting: Setting, kind: str) -> Row:
    """Two prompts, the shorter one padded on the left; its padding is not compared."""
    text = tokens(setting, batch=2)
    text[1, :60] = 0
    real = text != 0
    right = build(setting, kind)(text, attention_mask=real.long()).logits
    model = compiled(setting, kind)
    with record() as log:
        own = model(text, attention_mask=real.long()).logits
    return compare(own[real], right[real], log.calls)


def in_chunks(setting: Setting, kind: str) -> Row:
    """A prompt in three chunks over a dynamic cache."""
    import transformers

    text = tokens(setting)
    right = build(setting, kind)(text).logits
    model = compiled(setting, kind)
    cache = transformers.DynamicCache(config=model.config)
    parts = []
    with record() as log:
        for part in text.split(256, 1):
            parts.append(model(part, past_key_values=cache).logits)
    return compare(torch.cat(parts, 1), right, log.calls)


def static_cache(setting: Setting, kind: str) -> Row:
    """A prompt into a static cache that is longer."""
    import transformers

    text = tokens(setting)
    right = build(setting, kind)(text).logits
    model = compiled(setting, kind)
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 100)
    with record() as log:
        own = model(text, past_key_values=cache).logits
    return compare(own, right, log.calls)


def registered(setting: Setting, kind: str) -> Row:
    """`attn_implementation="minference"` without any compilation."""
    mpass.register_attention()
    text = tokens(setting)
    right = build(setting, kind)(text).logits
    own = build(setting, kind, "minference")(text).logits
    error = compare(own, right, [])["error"]
    return {"error": error, "ok": error < MODEL_ERROR}


def by_inductor(setting: Setting, kind: str) -> Row:
    """All else compiled by Inductor, as by default."""
    return whole_prompt(setting, kind, inner_backend="eager" if setting.smoke else "inductor")


def in_a_cuda_graph(setting: Setting, kind: str) -> Row:
    """`mode="reduce-overhead"`: the third call replays what the second has recorded."""
    text = tokens(setting)
    right = build(setting, kind)(text).logits
    if setting.smoke:
        return {"skipped": "no CUDA graphs on a CPU", "ok": True}
    model = compiled(setting, kind, mode="reduce-overhead", inner_backend="inductor")
    try:
        with record() as log:
            model(text, use_cache=False)
        for _ in range(2):
            own = model(text, use_cache=False).logits.clone()
    except RuntimeError as error:
        alone = without_us_in_a_cuda_graph(setting, kind, text)
        return {"error": str(error)[:200], "inductor alone": alone, "ok": bool(alone)}
    return compare(own, right, log.calls)


def without_us_in_a_cuda_graph(setting: Setting, kind: str, text: Tensor) -> str:
    """What Inductor says of the same model in the same mode; "" where it has no complaint."""
    torch._dynamo.reset()
    model = build(setting, kind, "sdpa" if kind == "llama" else "eager")
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    try:
        for _ in range(3):
            model(text, use_cache=False)
    except RuntimeError as error:
        return str(error)[:200]
    return ""


SCENARIOS: dict[str, Callable[[Setting, str], Row]] = {
    "whole prompt": whole_prompt,
    "by inductor": by_inductor,
    "measured": measured,
    "padded batch": padded_batch,
    "in chunks": in_chunks,
    "static cache": static_cache,
    "registered": registered,
    "in a CUDA graph": in_a_cuda_graph,
}
