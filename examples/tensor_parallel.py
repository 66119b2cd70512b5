"""A model on several devices by transformers' tensor parallelism, its prefill sparse.

    torchrun --nproc_per_node 2 examples/tensor_parallel.py MODEL_FOLDER PROMPT_FILE [CONFIG]

CONFIG, the JSON of a SparseConfig, is written for the whole model: each rank takes the patterns of
its own heads. The heads of the model must divide among the ranks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, DistributedConfig

import mpass


def main(folder: str, prompt_file: str, config: str | None = None) -> None:
    """Print the model's next word, and what became of the attention of rank 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(tp_plan="auto"),
    ).eval()
    model.compile(backend="minference", options={} if config is None else {"config": config})
    prompt = tokenizer(Path(prompt_file).read_text(encoding="utf-8"), return_tensors="pt")
    with torch.no_grad():
        logits = model(prompt.input_ids.to(model.device), logits_to_keep=1).logits
    if dist.get_rank() == 0:
        print("next:", tokenizer.decode(logits[0, -1].argmax()))
        print(mpass.last_report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
