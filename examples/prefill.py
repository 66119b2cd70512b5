"""A long prompt through a model with sparse attention: what a user writes.

    python examples/prefill.py MODEL_FOLDER PROMPT_FILE

`model.compile` works in place: `torch.compile(model).generate()` would compile nothing, because
`generate` calls the model it belongs to and not the wrapper. The prefill becomes sparse; decode
steps, one query at a time, stay as Inductor has them.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpass


def main(folder: str, prompt_file: str) -> None:
    """Print what the model says after the prompt, and what became of its attention."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.compile(backend="minference")
    prompt = tokenizer(Path(prompt_file).read_text(encoding="utf-8"), return_tensors="pt")
    with torch.no_grad():
        logits = model(prompt.input_ids, logits_to_keep=1).logits  # the prefill: sparse
        print("next:", tokenizer.decode(logits[0, -1].argmax()))
        print(mpass.last_report())
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    print(tokenizer.decode(output[0, prompt.input_ids.shape[1] :]))


if __name__ == "__main__":
    main(*sys.argv[1:])
