"""The worker of vLLM on a CPU, without the plugin of mpass and without cached prefixes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from protocol import serve

threads = int(sys.argv[3])
os.environ.update(
    OMP_NUM_THREADS=str(threads),
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    MPASS_VLLM="0",
)


class Engine:
    """An engine that takes a whole prompt in one step."""

    def __init__(self, folder: str, longest: int) -> None:
        import vllm

        self.vllm = vllm
        self.version = f"vllm {vllm.__version__}"
        self.engine = vllm.LLM(
            model=folder,
            dtype="bfloat16",
            max_model_len=min(longest + 64, 8192),
            max_num_batched_tokens=longest + 64,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def run(self, tokens: Sequence[int], **settings: object) -> object:
        sampling = self.vllm.SamplingParams(temperature=0, ignore_eos=True, **settings)
        prompt = [{"prompt_token_ids": list(tokens)}]
        return self.engine.generate(prompt, sampling, use_tqdm=False)[0]

    def first_token(self, tokens: Sequence[int]) -> int:
        return int(self.run(tokens, max_tokens=1).outputs[0].token_ids[0])

    def continue_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        return [int(token) for token in self.run(tokens, max_tokens=count).outputs[0].token_ids]

    def loss(self, tokens: Sequence[int]) -> float | None:
        found = self.run(tokens, max_tokens=1, prompt_logprobs=0).prompt_logprobs
        known = [-entry[token].logprob for token, entry in zip(tokens[1:], found[1:], strict=True)]
        return sum(known) / len(known)


if __name__ == "__main__":
    place, longest = sys.argv[1], int(sys.argv[4])
    serve(lambda: Engine(place, longest))
