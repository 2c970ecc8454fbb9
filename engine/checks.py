"""Check a configuration against its checkpoint, device and ranks before weights are read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.adapters import ModelAdapter, VideoSpec
from engine.config import RunConfig
from engine.decode.tiling import check_tiles
from engine.errors import UserError, as_user_error
from engine.given.frames import GivenFrames
from engine.kernel_choice import select_kernels
from engine.load.experts import check_sides
from engine.ranks.layouts import Ranks, check_layout
from engine.schedulers import check_levels
from freespec.far_keys import far_tokens
from freespec.methods.base import names_tiers
from freespec.riflex import Riflex


def check_call(prompt: str, negative_prompt: str, seed: int) -> None:
    """Raise UserError for texts and seeds of a call that a configuration would not take."""
    for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        if not isinstance(text, str):
            raise UserError(f"the {what} must be one text, got {text!r:.60}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f"the seed must be a whole number in [0, 2**63), got {seed!r:.60}")


def check_model(
    config: RunConfig,
    adapter: ModelAdapter,
    spec: VideoSpec,
    *,
    index: Mapping[str, Any],
    transformer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> None:
    """Raise UserError for settings that this model cannot serve.

    `index` is its model_index.json, `transformer` and `scheduler` are the configurations of these parts.
    """
    check_experts(config, adapter.experts_named(index))
    check_text_tokens(config, adapter.text_tokens(transformer))
    check_tiles(config.decode, spec)
    check_riflex(adapter, config.attention.riflex)
    check_far_tokens(config, spec)
    check_layers(config, transformer)
    check_shift(scheduler, config.sampler.shift)
    check_levels(config.sampler, scheduler)


def check_experts(config: RunConfig, experts: Sequence[str]) -> None:
    """Raise UserError for settings that do not match the checkpoint's number of transformers."""
    model, second = config.model, config.sampler.guidance_scale_2
    check_sides(model, experts)
    if len(experts) == 1 and second is not None:
        raise UserError(
            f"sampler.guidance_scale_2 {second:g} is for a checkpoint of two transformers, and this one has one; leave it out (null)"
        )
    if len(experts) == 1 and model.idle_expert != "auto":
        raise UserError(
            f"model.idle_expert {model.idle_expert} is for a checkpoint of two transformers, and this one has one; leave it out"
        )


def check_text_tokens(config: RunConfig, only: int | None) -> None:
    """Raise UserError for a number of text tokens that the checkpoint does not take, if it takes one number only."""
    if only is not None and config.sampler.max_text_tokens != only:
        raise UserError(
            f"sampler.max_text_tokens must be {only} for this checkpoint, got {config.sampler.max_text_tokens}: diffusers tells the tokens "
            "of its pictures from those of the text by that number"
        )


def check_kernels(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError for attention kernels that do not run on this device and dtype."""
    attention = config.attention
    with as_user_error():
        select_kernels(device, dtype, kernel=attention.kernel, dual=attention.dual, complement=attention.complement)


def check_ranks(config: RunConfig, ranks: Ranks) -> None:
    """Raise UserError for ranks that cannot make the videos of a configuration."""
    provider = config.parallel.provider
    config.sampler.check_cfg(ranks.mesh.cfg.size)
    if (provider == "xfuser") != (ranks.hybrid is not None):
        raise UserError(
            f"parallel.provider is {provider}, but the ranks were joined for another one; make both from one configuration "
            "(engine.planner.arrange.join_ranks)"
        )
    check_layout(config.method.name, config.method.method, ranks.degrees)


def check_riflex(adapter: ModelAdapter, riflex: Riflex) -> None:
    """Raise UserError for RIFLEx on a model whose temporal positions do not count frames."""
    if riflex.enabled and not adapter.counts_frames:
        raise UserError(
            f"attention.riflex does nothing for {adapter.name}: its temporal positions are seconds within a range that longer "
            "videos stay in; set attention.riflex.enabled false"
        )


def check_far_tokens(config: RunConfig, spec: VideoSpec, *, num_frames: int | None = None, beside: int = 0) -> None:
    """Raise UserError for fewer far keys than one per frame; `beside` is the number of pictures that have tokens of their own."""
    video = config.video
    latent = spec.latent_shape(num_frames or video.num_frames, video.height, video.width)[2:]
    frames, rows, columns = (size // patch for size, patch in zip(latent, spec.patch, strict=True))
    sizes = {
        "num_frames": frames + beside,
        "frame_tokens": rows * columns,
        "window_frames": config.method.window_frames,
    }
    with as_user_error():
        far_tokens(config.attention.far, **sizes)


def check_beside(config: RunConfig, spec: VideoSpec, given: GivenFrames | None, *, num_frames: int) -> None:
    """Raise UserError for settings that do not suit pictures whose tokens stand beside those of the video."""
    video, method = config.video, config.method
    beside = 0
    if given is not None:
        beside = given.num_beside(num_frames=num_frames, fps=video.fps, pictures=spec.pictures)
    if beside == 0:
        return
    frames = spec.latent_shape(num_frames, video.height, video.width)[2] // spec.patch[0]
    if names_tiers(method.method) and frames > method.window_frames:
        raise UserError(
            f"method {method.name} counts positions in latent frames of the video, and this checkpoint sees each of the pictures at later "
            f"frames than the first ({beside}) as one more frame between them; give first alone, or choose another method"
        )
    check_far_tokens(config, spec, num_frames=num_frames, beside=beside)


def check_layers(config: RunConfig, transformer: Mapping[str, Any]) -> None:
    """Raise UserError for a method's layers that the checkpoint lacks; one that names no number is checked when it is loaded."""
    with as_user_error():
        if "num_layers" in transformer:
            config.method.method.check_layers(transformer["num_layers"])


def check_shift(scheduler: Mapping[str, Any], shift: str) -> None:
    """Raise UserError for `sampler.shift actual` if the scheduler has one shift for any length.

    `scheduler` is the configuration of the checkpoint's scheduler.
    """
    if shift == "actual" and not scheduler.get("use_dynamic_shifting"):
        raise UserError(
            "sampler.shift actual has no effect on this checkpoint: its scheduler has one shift for any length; leave it out, or "
            "set that shift with sampler.flow_shift"
        )
