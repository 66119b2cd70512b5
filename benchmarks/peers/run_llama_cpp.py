"""The worker of llama.cpp with flash attention, by llama-cpp-python; the model is a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import llama_cpp
from protocol import serve


class Context:
    """A context of the longest prompt, emptied before each request."""

    def __init__(self, path: str, threads: int, longest: int) -> None:
        self.model = llama_cpp.Llama(
            model_path=path,
            n_ctx=longest + 64,
            n_batch=2048,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def first_token(self, tokens: Sequence[int]) -> int:
        return self.continue_tokens(tokens, 1)[0]

    def continue_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        self.model.reset()
        self.model._ctx.kv_cache_clear()
        self.model.eval(list(tokens))
        found = [int(self.model.sample(temp=0.0))]
        while len(found) < count:
            self.model.eval(found[-1:])
            found.append(int(self.model.sample(temp=0.0)))
        return found

    def loss(self, tokens: Sequence[int]) -> float | None:
        return None


if __name__ == "__main__":
    place, count, longest = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
    serve(lambda: Context(place, count, longest))
