"""A second turn of a conversation: its prefill attends to the cache of the first, sparse.

    python examples/second_turn.py MODEL_FOLDER FIRST_FILE SECOND_FILE

One graph serves prefills of any length over any cache; decoding steps stay dense.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import mpass


def main(folder: str, first_file: str, second_file: str) -> None:
    """Print what the model says after each turn, and what became of its attention."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.compile(backend="minference")
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), mpass.record() as log:
        for file in (first_file, second_file):
            turn = tokenizer(Path(file).read_text(encoding="utf-8"), return_tensors="pt").input_ids
            logits = model(turn, past_key_values=cache, logits_to_keep=1).logits
            print("next:", tokenizer.decode(logits[0, -1].argmax()))
    print(mpass.last_report())
    for call in log.calls:
        share = float(call.density.mean())
        print(f"layer {call.layer}: {call.num_queries} queries, {call.num_keys} keys, {share:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
