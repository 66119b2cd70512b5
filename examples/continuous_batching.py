"""Many prompts at once, packed by transformers' continuous batching, with long prefills sparse.

    python examples/continuous_batching.py MODEL_FOLDER PROMPT_FILE...

Requests come and go step by step: a short one is answered while a long prompt is read in. Only the
prefills of long prompts become sparse; `mpass serve MODEL_FOLDER` does the same behind HTTP.
"""

import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

import mpass


def main(folder: str, *files: str) -> None:
    """Print what the model says after each prompt."""
    mpass.register_attention(paged=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    prompts = [tokenizer(Path(file).read_text(encoding="utf-8")).input_ids for file in files]
    longest = max(len(prompt) for prompt in prompts)
    batching = ContinuousBatchingConfig(
        page_size=256,
        num_blocks=sum(len(prompt) // 256 + 2 for prompt in prompts),
        max_batch_tokens=min(8192, max(2048, longest)),
    )
    greedy = GenerationConfig(max_new_tokens=16, do_sample=False)
    done = model.generate_batch(
        prompts, generation_config=greedy, continuous_batching_config=batching
    )
    for file, request in zip(files, by_number(done), strict=True):
        print(f"{file}: {request.error or tokenizer.decode(request.generated_tokens)}")


def by_number(done: dict) -> list:
    """The requests in the order in which they were given: their names end in a number."""
    return [done[name] for name in sorted(done, key=lambda name: int(name.rpartition("_")[2]))]


if __name__ == "__main__":
    main(*sys.argv[1:])
