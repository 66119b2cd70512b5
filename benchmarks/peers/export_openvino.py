"""Write a folder that OpenVINO GenAI reads from a folder in transformers' format.

.venv-openvino/bin/python benchmarks/peers/export_openvino.py FROM TO
"""

from __future__ import annotations

import sys

from openvino import save_model
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM
from transformers import AutoTokenizer

source, target = sys.argv[1:]
model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
model.save_pretrained(target)
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.save_pretrained(target)
for converted, name in zip(
    convert_tokenizer(tokenizer, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
):
    save_model(converted, f"{target}/openvino_{name}.xml")
