"""A GGUF file of a packaged model with its weights in bf16: what transformers is given, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

from mpass.models.load import PACKAGED_MODELS, packaged_gguf

STORED_IN_FILES = ("GGUF.", "general.architecture", "general.file_type")
"""Fields that the writer makes itself."""


def write_gguf(model: str, target: Path) -> None:
    """Write the packaged model's GGUF file anew, matrices in bf16 and vectors in fp32."""
    reader = GGUFReader(packaged_gguf(PACKAGED_MODELS[model]))
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith(STORED_IN_FILES):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim > 1:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
