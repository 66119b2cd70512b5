"""The worker of OpenVINO GenAI: kinds dense, xattention and trishape, `-f32` for products in fp32.

Prompts are one chunk: XATTENTION gives other tokens where they are split. The model is a folder
that export_openvino.py has written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai as genai
from protocol import serve


class Pipeline:
    """A pipeline of continuous batching with one request at a time and no cached prefixes."""

    def __init__(self, folder: str, kind: str, threads: int, longest: int) -> None:
        mode, _, precision = kind.partition("-")
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = longest + 64
        scheduler.cache_size = 2
        scheduler.dynamic_split_fuse = False
        scheduler.enable_prefix_caching = False
        if mode != "dense":
            scheduler.use_sparse_attention = True
            scheduler.sparse_attention_config = genai.SparseAttentionConfig(
                mode=getattr(genai.SparseAttentionMode, mode.upper())
            )
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision or "bf16",
        }
        self.pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.version = f"openvino {openvino.__version__}, genai {genai.__version__}"

    def continue_tokens(self, tokens: Sequence[int], count: int) -> list[int]:
        settings = genai.GenerationConfig()
        settings.max_new_tokens = count
        settings.do_sample = False
        settings.ignore_eos = True
        settings.apply_chat_template = False
        prompt = openvino.Tensor(np.array([tokens], dtype=np.int64))
        return list(self.pipeline.generate([prompt], [settings])[0].m_generation_ids[0])

    def first_token(self, tokens: Sequence[int]) -> int:
        return self.continue_tokens(tokens, 1)[0]

    def loss(self, tokens: Sequence[int]) -> float | None:
        """Not told: with `echo` the score of a result is still that of what was generated alone."""
        return None


if __name__ == "__main__":
    place, chosen, count, longest = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    serve(lambda: Pipeline(place, chosen, count, longest))
