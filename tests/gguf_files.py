"""GGUF files of transformers, in the layout in which they are published for other programs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor


def save_gguf(file: Path, tensors: Mapping[str, Tensor], rename: Callable[[str], str], kind: Any) -> Path:
    """Write tensors by the authors' names: matrices of the blocks as `kind`, other vectors and matrices in fp32, kernels in bf16."""
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(str(file), "a transformer")
    for key, tensor in tensors.items():
        matrix = tensor.dim() == 2 and "blocks." in key and key.endswith(".weight")
        other = types.BF16 if tensor.dim() > 3 else types.F32
        stored = kind if matrix else other
        writer.add_tensor(rename(key), gguf.quants.quantize(tensor.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
