"""A program for vLLM's Python: prompts through an engine in this process, results as JSON.

    python engine_program.py '{"model": FOLDER, "engine": {...}, "batches": [...]}'

Each batch is {"prompts": [[token ids]], "tokens": n}. The line that begins with RESULT is a list
of what came of each: the greedy tokens of every prompt, how many of a prompt were cached, and the
plugin's counts so far in every worker. Other lines are vLLM's.
"""

from __future__ import annotations

import json
import os
import sys

RESULT = "RESULT "

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "MPASS_STRICT": "1",
}


def counts(worker):
    """The plugin's counts in the process of a worker."""
    from mpass.serving.vllm import process_counters

    return process_counters().as_dict()


def main(job):
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    llm = LLM(model=job["model"], enforce_eager=True, max_num_seqs=4, **job["engine"])
    found = []
    for batch in job["batches"]:
        sampling = SamplingParams(temperature=0, max_tokens=batch["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        out = llm.generate(prompts, sampling, use_tqdm=False)
        found.append(
            {
                "tokens": [list(one.outputs[0].token_ids) for one in out],
                "cached": [one.num_cached_tokens for one in out],
                "counts": llm.collective_rpc(counts),
            }
        )
    print(f"\n{RESULT}{json.dumps(found)}", flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
