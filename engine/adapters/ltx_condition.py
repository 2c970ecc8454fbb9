"""LTX-Video checkpoints whose model_index.json names LTXConditionPipeline: pictures at any frame, as conditions.

A picture at frame 0 is the first latent frame. Each other one is a latent frame of its own beside the video's, at the position in time
of its frame, with timestep 0. The stock pipeline puts these tokens before the video's; here they stand after the latent frame of their
moment, so that windows hold them with the frames around it. Positions are in the rotary table, so that the order decides the
order of sums alone.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from torch import Tensor

from engine.adapters.base import Condition, ModelAdapter, Text, VideoSpec, order_of_tokens
from engine.adapters.ltx import LtxAdapter
from engine.config import ANY_FRAME
from engine.errors import UserError
from engine.schedulers import ADVICE, TRAINED_TIMESTEPS, fixed_shift


class LtxConditionAdapter(LtxAdapter):
    """LTXConditionPipeline: positions are seconds and pixels of the decoded frames, and the noise levels are linear, then quadratic."""

    name = "LTX-Video with conditions"
    index_names = ("LTXConditionPipeline",)
    pipeline_class = LTXConditionPipeline
    pipeline_classes = (LTXConditionPipeline,)

    def video_spec(
        self, transformer: dict[str, Any], vae: dict[str, Any], index: Mapping[str, Any] | None = None
    ) -> VideoSpec:
        """See the base class."""
        return replace(super().video_spec(transformer, vae, index), pictures=("first", ANY_FRAME))

    def grid(self, transformer: Any, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """See the base class; of a forward of the stock pipeline, which has positions alone, read from them."""
        coords = inputs.get("video_coords")
        if inputs.get("num_frames") is not None or coords is None:
            return super().grid(transformer, inputs)
        times, rows, columns = coords[0].cpu()
        if times[0] > 0:
            raise UserError(
                "the pipeline has a condition at a later frame than the first, whose tokens it puts before the video; a method takes "
                "those at frame 0 alone, and all others as given frames of freespec generate or LongVideoEngine"
            )
        size = len(rows.unique()), len(columns.unique())
        return times.numel() // (size[0] * size[1]), *size

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a start inside the schedule, and latents, which the stock pipeline takes only there."""
        strength = arguments.get("denoise_strength", 1.0)
        if strength < 1:
            raise UserError(
                f"denoise_strength {strength:g} starts LTXConditionPipeline inside its scheduler's steps, and a method is planned for all "
                "of them; leave denoise_strength out, or call the handle's remove() first"
            )
        if arguments.get("latents") is not None:
            raise UserError(
                "LTXConditionPipeline ignores latents= and draws noise of its own; leave it out, or take LongVideoEngine for the "
                "noise of a method"
            )

    def set_timesteps(
        self, scheduler: Any, num_steps: int, *, num_tokens: int, shift: str, device: torch.device | None
    ) -> dict[str, Any]:
        """Set noise levels that are linear, then quadratic; the scheduler must not shift them, as timesteps would not follow."""
        config = scheduler.config
        shifts = {key: config.get(key) for key in ("use_dynamic_shifting", "shift_terminal") if config.get(key)}
        if shifts or fixed_shift(scheduler) not in (None, 1.0):
            found = ", ".join(f"{key} {value}" for key, value in (shifts or {"shift": fixed_shift(scheduler)}).items())
            raise UserError(
                f"LTXConditionPipeline sets the timesteps itself, and the {type(scheduler).__name__} would shift its noise levels alone "
                f"({found}); leave sampler.flow_shift unset, or use the scheduler of an LTX-Video 0.9.5 or later; {ADVICE}"
            )
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        if "sigmas" not in accepted:
            raise UserError(
                f"LTXConditionPipeline gives its scheduler the steps one by one, which {type(scheduler).__name__} does not take; {ADVICE}"
            )
        timesteps = (linear_quadratic_schedule(num_steps) * TRAINED_TIMESTEPS).numpy()
        both = {"sigmas": timesteps / np.float32(TRAINED_TIMESTEPS), "timesteps": timesteps}
        scheduler.set_timesteps(**{name: both[name] for name in both if name in accepted}, device=device)
        return {"shift": "fixed", "value": fixed_shift(scheduler), "levels": "linear-quadratic"}

    def predict(
        self,
        pipe: LTXConditionPipeline,
        latents: Tensor,
        timestep: Tensor,
        texts: dict[str, Text],
        *,
        fps: int,
        expert: str = "transformer",
        condition: Condition | None = None,
    ) -> list[Tensor]:
        """See the base class; the pictures' frames are put in before the forward, and left out of its predictions."""
        condition, step = condition or Condition(), pipe.vae_temporal_compression_ratio
        frames, places = latents.shape[2], condition.places(step)
        order = order_of_tokens(frames, places)
        if condition.beside is not None:
            latents = torch.cat([latents, condition.beside], dim=2)[:, :, order]
        times = [max(index * step + 1 - step, 0) for index in range(frames)] + list(condition.moments)
        clean = [index < condition.clean_frames or index >= frames for index in order]
        coords = self._coordinates(pipe, [times[index] for index in order], latents, fps=fps)
        made = self._forward(pipe, latents, timestep, texts, clean=clean, video_coords=coords)
        kept = [position for position, index in enumerate(order) if index < frames]
        return [prediction[:, :, kept] for prediction in made] if places else made

    def _coordinates(self, pipe: LTXConditionPipeline, times: Sequence[int], latents: Tensor, *, fps: int) -> Tensor:
        """Seconds, and pixels down and across, of each token: [1, 3, S]."""
        device, size = latents.device, pipe.vae_spatial_compression_ratio
        rows, columns = (torch.arange(length, device=device) * size for length in latents.shape[3:])
        grid = torch.meshgrid(torch.tensor(times, device=device), rows, columns, indexing="ij")
        coords = torch.stack(grid).flatten(1)[None].float()
        coords[:, 0] *= 1.0 / fps
        return coords

    def guide(self, predictions: Sequence[Tensor], scale: float) -> Tensor:
        """In the model's precision, as the stock pipeline combines them, and then in fp32 for its scheduler's step."""
        return ModelAdapter.guide(self, predictions, scale).float()

    def condition(
        self, pipe: LTXConditionPipeline, pictures: Mapping[str, np.ndarray], *, num_frames: int
    ) -> Condition:
        """See the base class: the first latent frame, and one beside the video for each other picture."""
        made = {place: self.encode_pixels(pipe.vae, pixels[None]) for place, pixels in pictures.items()}
        moments = sorted(int(place) for place in made if place != "first")
        beside = [made[str(moment)] for moment in moments]
        return Condition(
            latents=made.get("first"), beside=torch.cat(beside, dim=2) if beside else None, moments=tuple(moments)
        )


LTX_CONDITION = LtxConditionAdapter()
