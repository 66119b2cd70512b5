"""Search a pattern per head on a text, keep the config, and compile with it.

    python examples/searched_config.py MODEL_FOLDER TEXT_FILE CONFIG.json

The config is written beside the model's other files in practice: as `minference.json` in the
model's folder the backend finds it by itself.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpass
from mpass.calibration.search import Settings


def main(folder: str, text_file: str, config_file: str, length: str = "4096") -> None:
    """Search on the first half of a text of 2 * `length` tokens, compile, and run the second."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        Path(text_file).read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    searched, held_out = tokens[:, : int(length)], tokens[:, int(length) : 2 * int(length)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    config = mpass.calibrate(
        model,
        [searched],
        candidates=[mpass.AShape(128, 1024), mpass.VerticalBlock(), mpass.Dense()],
        settings=Settings(budget=None, max_loss=0.02),  # nats per token over dense, as predicted
    )
    config.save(config_file)

    mpass.compile(model, config=mpass.SparseConfig.load(config_file), min_seq_len=256)
    with torch.no_grad():
        model(held_out, logits_to_keep=1)
    print(mpass.last_report())


if __name__ == "__main__":
    main(*sys.argv[1:])
