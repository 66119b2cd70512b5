"""A long prompt through vLLM with sparse attention: what a user writes.

    python examples/vllm_offline.py MODEL_FOLDER PROMPT_FILE

Nothing of mpass is imported: vLLM finds the plugin by itself, in each of its processes. Leave out
`additional_config` and the config that lies beside the model counts, else the default.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(folder: str, prompt_file: str) -> None:
    """Print what the model says after the prompt."""
    llm = LLM(
        model=folder,
        max_num_batched_tokens=8192,  # larger chunks of a prompt are worth more
        additional_config={"minference": {"pattern": "union", "min_seq_len": 2048}},
    )
    prompt = Path(prompt_file).read_text(encoding="utf-8")
    (answer,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=16))
    print(answer.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
