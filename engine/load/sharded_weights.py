"""Transformer and text encoder sharded over the ranks (model.weights zero3), and text that all ranks encode together."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from engine.adapters.base import EXPERTS, Text
from engine.config import ModelConfig
from engine.errors import UserError
from engine.paths import expand
from engine.ranks.agreement import broadcast_bytes, raise_together
from parallel.mesh import SeqMesh
from parallel.zero3 import check_zero3, held_bytes, keep_shares_in_file, shard_weights

GIB = 2**30
Encode = Callable[[list[str]], list[Text]]


def check_placement(config: ModelConfig, device: torch.device, text_device: str) -> None:
    """Raise UserError for a placement of weights that the device or the text encoder's placement does not allow."""
    if config.weights in ("cpu_offload", "block_offload") and device.type != "cuda":
        parts = "parts" if config.weights == "cpu_offload" else "blocks"
        raise UserError(
            f"model.weights {config.weights} moves {parts} between CPU and GPU and needs CUDA, and the model is on the CPU "
            "already; use model.weights resident"
        )
    if config.weights == "cpu_offload" and text_device == "cpu":
        raise UserError(
            "parallel.text_device cpu and model.weights cpu_offload cannot be combined; offload moves the encoder"
        )
    if config.weights == "zero3":
        try:
            check_zero3(device)
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from error
    folder = config.shards_folder
    if folder is not None and not expand(folder).is_dir():
        raise UserError(f"model.shards {config.shards}: there is no folder {folder}; make it, on a fast drive")


def shards_text(config: ModelConfig, text_device: str) -> bool:
    """Whether the text encoder is sharded, so that all ranks must encode together."""
    return config.weights == "zero3" and text_device == "model"


def shard_pipeline(
    pipe: DiffusionPipeline, config: ModelConfig, *, with_text: bool, mesh: SeqMesh, device: torch.device
) -> None:
    """Shard the transformers and, `with_text`, the text encoder over all ranks of the mesh; all ranks call this.

    All axes share the weights, since both halves of a cfg axis run the same layers once a step. Raises UserError, on all ranks
    together, if a rank has no room for its shares.
    """
    keep: Literal["device", "cpu"] = "device" if config.shards == "device" else "cpu"
    experts = [part for name in EXPERTS if (part := getattr(pipe, name, None)) is not None]
    for part in (*experts, pipe.text_encoder) if with_text else experts:
        shard_weights(part, group=mesh.world.group, device=device, keep=keep)
        if config.shards_folder is not None:
            raise_together(mesh, partial(_into_file, part, expand(config.shards_folder)))


def encode_on_all(mesh: SeqMesh, encode: Encode, look_up: Callable[[Encode], list[Text]]) -> list[Text] | None:
    """Return rank 0's cached text, or text that all ranks encode together; None on the other ranks.

    Args:
        mesh: the ranks, all of which call this.
        encode: runs the encoder, whose layers are gathered from all ranks.
        look_up: reads the cache on rank 0; its argument encodes prompts that are not in the cache.

    Raises the UserError of `encode` on all ranks, and on rank 0 that of `look_up`.
    """
    if mesh.world.rank > 0:
        failure = None
        while prompts := broadcast_bytes(mesh, b"", "prompts to encode"):
            try:
                encode(json.loads(prompts))
            except UserError as error:  # rank 0 has the same error, and ends the loop
                failure = error
        if failure is not None:
            raise failure
        return None

    def encode_with_others(prompts: list[str]) -> list[Text]:
        broadcast_bytes(mesh, json.dumps(prompts).encode(), "prompts to encode")
        return encode(prompts)

    try:
        texts = look_up(encode_with_others)
    except (
        UserError,
        OSError,
    ):  # errors that end a run on all ranks together; after a lost rank the others cannot be told
        broadcast_bytes(mesh, b"", "prompts to encode")
        raise
    broadcast_bytes(mesh, b"", "prompts to encode")
    return texts


def _into_file(part: nn.Module, folder: Path) -> None:
    try:
        keep_shares_in_file(part, folder)
    except OSError as error:
        raise UserError(
            f"cannot keep {held_bytes(part) / GIB:.1f} GiB of weights in {folder}: {error.strerror or error}"
        ) from error
