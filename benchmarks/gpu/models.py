"""Compiled programs: the crossover to dense attention, and the prefill of a Llama-3.1-8B."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

import mpass
from benchmarks.gpu.clock import milliseconds, milliseconds_in_turns
from benchmarks.gpu.setting import TOP_K, Row, Setting, Work
from mpass.lowering.recorder import record

CROSSOVER_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384, 32768)
"""From the shortest prompt that a user may care about to those that are surely sparse."""

LONGEST_DENSE = 262144
"""Longest prefill of the dense model: twice as long takes minutes."""


def crossover(setting: Setting) -> Iterator[Work]:
    """Compiled with all defaults, it should never take longer than without us.

    Neither where the work is usual nor where nothing is sparse ("plain inputs"): there the first
    call may, and those after it go by what it selected.
    """
    plain = dataclasses.replace(setting, planted=False)
    yield "crossover/never waits/8192", functools.partial(never_waits, plain, 8192)
    for length in (130,) if setting.smoke else CROSSOVER_LENGTHS:
        yield f"crossover/{length}", functools.partial(compare_attention, setting, length)
        name = f"crossover/plain inputs/{length}"
        yield name, functools.partial(compare_attention, plain, length)


def compare_attention(setting: Setting, length: int) -> Row:
    """One attention as a user compiles it, with all defaults, against backend="inductor".

    They take turns, so that what else goes on meets all of them alike. slowdown: above 1.03 the
    crossover is set too low. always_sparse_ms: without it. again: the time of inductor's program
    compiled a second time over the first one's, which says what of a slowdown is noise. chosen:
    what ran at last, "sparse" or "dense", and why if an op chose dense.
    """
    query, key, value = setting.tensors(length)
    inner: dict[str, Any] = {"inner_backend": "eager"} if setting.smoke else {}
    always = {"min_seq_len": 0, "dense_above": 1.0}
    dense = {"backend": "eager" if setting.smoke else "inductor"}
    torch._dynamo.reset()
    programs = {
        "minference": causal_program(backend="minference", options=inner),
        "always_sparse": causal_program(backend="minference", options=inner | always),
        "inductor": causal_program(**dense),
        "inductor_again": causal_program(**dense),
    }
    with torch.no_grad():
        runs = {name: functools.partial(run, query, key, value) for name, run in programs.items()}
        spent = milliseconds_in_turns(runs, setting.device)
        row: Row = {f"{name}_ms": spent[name] for name in list(runs)[:3]}
        row |= chosen_by(runs["minference"])
    dense_ms = min(spent["inductor"], spent["inductor_again"])
    again = spent["inductor_again"] / spent["inductor"]
    return row | {"slowdown": spent["minference"] / dense_ms, "again": again}


def causal_program(**arguments: Any) -> Callable[..., torch.Tensor]:
    """A compiled attention whose guards no other program's graphs stand before."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    # Dynamo keeps what it compiled by the code object.
    own = types.FunctionType(attend.__code__.replace(), attend.__globals__)
    compiled: Callable[..., torch.Tensor] = torch.compile(own, **arguments)
    return compiled


def never_waits(setting: Setting, length: int) -> Row:
    """Calls that go by what earlier ones selected, where a wait of the host is an error.

    calls: what ran each, "d" for dense; on plain inputs the first is sparse and most others are
    dense. difference: of a CUDA graph that was captured in between, to the calls.
    """
    if setting.smoke:
        return {"skipped": "a CPU does not wait for itself"}
    query, key, value = setting.tensors(length)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    torch._dynamo.reset()
    run = torch.compile(attend, backend="minference", options={"min_seq_len": 0})
    calls = ""
    with torch.no_grad():
        first = run(query, key, value)
        for _ in range(6):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run(query, key, value)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            calls += chosen_by(functools.partial(run, query, key, value))["chosen"][0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(query, key, value)
        graph.replay()
    difference = float((captured.float() - first.float()).abs().max())
    return {"ok": "d" in calls and difference < 1e-2, "calls": calls, "difference": difference}


def chosen_by(run: Callable[[], Any]) -> Row:
    """What one more call of a compiled attention runs, sparse or dense."""
    with record() as log:
        run()
    ran = [call.lowering for call in log.calls]
    row: Row = {"chosen": "dense" if set(ran) <= {"dense"} else "sparse"}
    return row | ({"reason": log.calls[0].reason} if "dense" in ran else {})


def prefills(setting: Setting) -> Iterator[Work]:
    for backend in ("minference", "inductor"):
        for length in setting.lengths:
            if backend == "minference" or length <= LONGEST_DENSE:
                yield (
                    f"prefill/{backend}/{length}",
                    functools.partial(prefill, setting, length, backend),
                )


def prefill(setting: Setting, length: int, backend: str) -> Row:
    """A model shaped like Llama-3.1-8B with random weights, compiled: fixed budgets, or dense.

    Random weights have no sparsity that an estimate of mass could find.
    """
    run, vocabulary = compiled_llama(setting, backend)
    tokens = torch.randint(0, vocabulary, (1, length), device=setting.device)
    with torch.no_grad():
        forward = functools.partial(run, tokens, use_cache=False, logits_to_keep=1)
        return {"ms": milliseconds(forward, setting.device, most=5)}


@functools.lru_cache(maxsize=1)
def compiled_llama(setting: Setting, backend: str) -> tuple[Callable[..., Any], int]:
    """The model compiled for prompts of any length, and the size of its vocabulary.

    One program serves all lengths, as it would a user's prompts: 32 layers take a minute or more.
    """
    model, vocabulary = llama(setting)
    arguments: dict[str, Any] = {"backend": backend}
    if backend == "minference":
        arguments["options"] = {"pattern": mpass.BlockSparse(TOP_K)}
    if setting.smoke:
        options: dict[str, Any] = {"pattern": mpass.VerticalSlash(30, 100), "min_seq_len": 0}
        options["inner_backend"] = "eager"
        sparse = backend == "minference"
        arguments = {"backend": backend, "options": options} if sparse else {"backend": "eager"}
    torch._dynamo.reset()
    return torch.compile(model, dynamic=True, **arguments), vocabulary


def llama(setting: Setting) -> tuple[Any, int]:
    """The model in eval mode, and the size of its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    full: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336}
    full |= {
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    full |= {"vocab_size": 128256, "rope_theta": 5e5}
    most = 2 * max(setting.lengths)
    config = LlamaConfig(**(tiny if setting.smoke else full), max_position_embeddings=most)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    with torch.device(setting.device), torch.no_grad():
        torch.set_default_dtype(torch.float32 if setting.smoke else torch.bfloat16)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    return model, int(config.vocab_size)
