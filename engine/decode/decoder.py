"""Decode latents with a VAE, over all ranks of a mesh or in one process, without transformer and text encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.adapters import VideoSpec
from engine.config import RunConfig
from engine.decode.pieces import stream_decode, to_uint8
from engine.decode.tiles import stream_tiles
from engine.decode.tiling import DecodePlan, check_tiles, plan_decode
from engine.devices import pick_device, wait_for
from engine.load.checkpoint import open_checkpoint
from engine.load.pipeline import load_vae_alone
from engine.progress import enabled, progress_bar
from engine.ranks.group_of_one import GROUP_OF_ONE
from parallel.mesh import Axis


class VideoDecoder:
    """Decodes latents to frames with one VAE.

    Attributes:
        spec: the numbers of the checkpoint.
        device: where the VAE works.
        decode_plan: the work of each rank, for the record; None before `decode` is called.
    """

    def __init__(self, config: RunConfig, *, vae: Any, spec: VideoSpec, device: torch.device, world: Axis) -> None:
        self.config = config
        self.spec = spec
        self.device = device
        self.decode_plan: dict[str, Any] | None = None
        self._vae = vae
        self._world = world

    def decode(self, latents: Tensor, *, seed: int | None = None) -> Iterator[np.ndarray]:
        """Decode latents [1, z, F, h, w] to frames, uint8 [t, H, W, 3] at a time, on rank 0; for Wan t = 1, then 4 per latent frame.

        Every rank calls this with the same latents and exhausts the iterator: the others decode their tiles, if any, and get
        no frames. Sets `decode_plan`. `seed` is that of the run, for decoders that take noise; None is `sampler.seed`.
        """
        seed = self.config.sampler.seed if seed is None else seed
        frames, rows, columns = latents.shape[2:]
        plan = plan_decode(self.config.decode, self._vae, (frames, rows, columns), world=self._world, seed=seed)
        self.decode_plan = plan.record
        return self._frames(latents, plan)

    def _frames(self, latents: Tensor, plan: DecodePlan) -> Iterator[np.ndarray]:
        is_first = self._world.rank == 0
        if plan.mode == "tiled":
            stream = stream_tiles(self._vae, latents, plan, world=self._world)
        else:
            stream = stream_decode(self._vae, latents, plan.time) if is_first else iter(())
        show = is_first and enabled(self.config.output.progress)
        num_frames = self.spec.num_frames(latents.shape[2])
        with progress_bar(total=num_frames, desc="decode", enabled=show) as bar:
            for frames in stream:
                wait_for(frames.device)
                yield to_uint8(frames)
                bar.update(frames.shape[2])


@contextmanager
def open_decoder(config: RunConfig) -> Iterator[VideoDecoder]:
    """Open the decoder of a checkpoint in this process; no other part of the checkpoint is loaded.

    Raises UserError for a checkpoint or tiles that cannot be used.
    """
    device = pick_device(config.model.device)
    check_tiles(config.decode, open_checkpoint(config.model).vae_spec)  # before the VAE is fetched and read
    spec, vae = load_vae_alone(config.model)
    world = GROUP_OF_ONE.acquire().world
    try:
        yield VideoDecoder(config, vae=vae.to(device), spec=spec, device=device, world=world)
    finally:
        GROUP_OF_ONE.release()
