"""Videos of a comparison that are not there yet, made by one loaded engine on all ranks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from engine.batch.locks import Shard
from engine.batch.variants import Variant
from engine.engine import LongVideoEngine
from engine.files.say import say_on_stderr
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError
from engine.load.checkpoint import open_checkpoint
from engine.planner.model import read_model
from engine.ranks.arrange import check_settings
from engine.ranks.layouts import check_layout
from launch.comparison.kept_measures import read_kept
from launch.comparison.store import Comparison, Video
from launch.make_video import make_video, summary
from launch.outputs import check_free_space
from launch.process.stopping import Stopped
from launch.ranks.join import DistContext
from launch.stages import Stage


def check_variants(variants: Sequence[Variant], context: DistContext) -> None:
    """Raise UserError, before a folder is taken or weights are read, for what the model or these ranks cannot run."""
    spec = read_model(variants[0].config.model)
    for variant in variants:
        config, video = variant.config, variant.config.video
        spec.video.check_video(video.num_frames, video.height, video.width)
        check_settings(config, spec)
        if context.ranks is not None:
            check_layout(variant.label, config.method.method, context.ranks.degrees)


def missing_videos(comparison: Comparison, context: DistContext, shard: Shard | None = None) -> list[Video]:
    """The videos (of a shard) that are neither whole nor kept by their measures, as rank 0 sees it, on every rank."""
    videos = comparison.videos_of(shard or Shard())

    def look() -> list[bool]:
        kept = read_kept(comparison)
        done = [video.key in kept or video.check() for video in videos]
        config = comparison.config
        size = config.video.num_frames, config.video.height, config.video.width
        missing = [video.files for video, is_done in zip(videos, done, strict=True) if not is_done]
        if missing:
            checkpoint = open_checkpoint(config.model)
            check_free_space(missing, config, checkpoint.spec.latent_shape(*size), model=checkpoint.folder)
        return done

    done = context.ask_first(look)
    return [video for video, is_done in zip(videos, done, strict=True) if not is_done]


def make_missing(
    engine: LongVideoEngine, comparison: Comparison, missing: Sequence[Video], context: DistContext
) -> None:
    """Make these videos, one after the other; rank 0 says a line for each."""
    for index, video in enumerate(missing):
        if index > 0:
            context.wait_for_first(f"{missing[index - 1].files.video} made")
        stage = context.ask_first(lambda video=video: _stage(video))
        record = _make(engine, comparison, video, stage)
        if record is not None:
            print(f"{index + 1} of {len(missing)}, {summary(record, video.files)}", flush=True)


def _stage(video: Video) -> Stage:
    """Whether latents are there to be decoded; what a failing disk has damaged of the work on a video is deleted."""
    for path in (video.files.latents, video.files.checkpoint):
        try:
            read_metadata(path)
        except DamagedError as error:
            say_on_stderr(f"{error.reason}; it is made again")
            path.unlink()
    return "decode" if video.files.latents.exists() else "denoise"


def _make(engine: LongVideoEngine, comparison: Comparison, video: Video, stage: Stage) -> dict[str, Any] | None:
    """One video, from its latents where an earlier run left them; its record on rank 0."""
    config = comparison.variant(video.label).config
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=video.seed))
    # Variants differ in method, noise and seed only: all that is loaded stays.
    engine.config = config
    engine.use_method(config.method)
    try:
        # What lies in the folder is this comparison's, which holds it: a video without a record is one that was cut off.
        return make_video(engine, config, video.prompt, video.files, stage=stage, replace=True)
    except Stopped as error:
        if not video.files.latents.exists():
            raise  # while denoising, and it has said how to go on
        raise Stopped(
            f"before {video.files.video} was decoded; its latents are kept, and the same command continues from them"
        ) from error
