"""Blocks that wait on the CPU until they run (`model.weights block_offload`), by diffusers' group offloading."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading


def offload_blocks(pipe: DiffusionPipeline, experts: Sequence[str], *, device: torch.device, with_text: bool) -> None:
    """Keep the transformers' blocks on the CPU, and bring each to the device while it runs; `with_text` the text encoder's as well.

    On CUDA the next block of a transformer is copied on a stream of its own from pinned memory while one runs. What is outside the
    blocks, such as embeddings, comes for as long as the whole forward. Values stay as they are, and every rank does the same.
    """
    groups = {"onload_device": device, "offload_device": torch.device("cpu"), "offload_type": "block_level"}
    for name in experts:
        getattr(pipe, name).enable_group_offload(**groups, num_blocks_per_group=1, use_stream=device.type == "cuda")
    if with_text:  # once a prompt: not worth a pinned copy
        apply_group_offloading(pipe.text_encoder, **groups, num_blocks_per_group=1, block_modules=["encoder"])
