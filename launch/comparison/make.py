"""Videos of a comparison that are not there yet, made by one loaded engine on all ranks."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch
from torch import Tensor

from engine.batch.locks import Shard
from engine.checkpoint import load_latents
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.parallelism import check_settings
from engine.planner.model import read_model
from engine.ranks import hand_out_bytes
from engine.supported_layouts import check_layout
from launch.commands.decode import read_record
from launch.commands.generate import make_video, summary
from launch.comparison.kept_measures import read_kept
from launch.comparison.store import Comparison, Key, Video
from launch.comparison.variants import Variant
from launch.ranks import Party
from launch.render import render
from launch.stopping import Stopped


def check_variants(variants: Sequence[Variant], party: Party) -> None:
    """Raise UserError, before a folder is taken or weights are read, for what the model or these ranks cannot run."""
    spec = read_model(variants[0].config.model)
    for variant in variants:
        config, video = variant.config, variant.config.video
        spec.video.check_video(video.num_frames, video.height, video.width)
        check_settings(config, spec)
        if party.ranks is not None:
            check_layout(variant.label, config.method.method, party.ranks.degrees)


def missing_videos(comparison: Comparison, party: Party, shard: Shard | None = None) -> list[Video]:
    """The videos (of a shard) that are neither there nor kept by their measures, as rank 0 sees it, on every rank."""
    videos = comparison.videos_of(shard or Shard())
    kept: set[Key] = set()
    party.check_on_first(lambda: kept.update(read_kept(comparison)))
    done = on_first(party, [video.is_done or video.key in kept for video in videos])
    return [video for video, is_done in zip(videos, done, strict=True) if not is_done]


def on_first(party: Party, seen: list[Any]) -> list[Any]:
    """What rank 0 sees of its files, on every rank; others may have other files."""
    if party.ranks is None:
        return seen
    return json.loads(hand_out_bytes(party.ranks.mesh, json.dumps(seen).encode(), "what is there already"))


def make_missing(engine: LongVideoEngine, comparison: Comparison, missing: Sequence[Video], party: Party) -> None:
    """Make these videos, one after the other; rank 0 says a line for each."""
    for index, video in enumerate(missing):
        if index > 0:
            party.wait_for_first(f"{missing[index - 1].files.video} made")
        record = _make(engine, comparison, video)
        if record is not None:
            print(f"{index + 1} of {len(missing)}, {summary(record, video.files)}", flush=True)


def _make(engine: LongVideoEngine, comparison: Comparison, video: Video) -> dict[str, Any] | None:
    """One video, from its latents where an earlier run left them; its record on rank 0."""
    config = comparison.variant(video.label).config
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, seed=video.seed))
    # Variants differ in method, noise and seed only: all that is loaded stays.
    engine.config = config
    engine.use_method(config.method)
    latents, record = _kept_latents(engine, video)
    try:
        return _finish(engine, config, video, latents, record)
    except Stopped as error:
        if not video.files.latents.exists():
            raise  # while denoising, and it has said how to go on
        raise Stopped(
            f"before {video.files.video} was decoded; its latents are kept, and the same command continues from them"
        ) from error


def _finish(
    engine: LongVideoEngine, config: RunConfig, video: Video, latents: Tensor | None, record: dict[str, Any]
) -> dict[str, Any] | None:
    if latents is None:
        return make_video(engine, config, video.prompt, video.files)
    if not engine.is_first:
        for _ in engine.decode(latents, seed=video.seed):
            pass
        return None
    record = render(engine, latents, record, video.files, output=config.output, fps=config.video.fps)
    video.files.latents.unlink()
    return record


def _kept_latents(engine: LongVideoEngine, video: Video) -> tuple[Tensor | None, dict[str, Any]]:
    """Latents that an interrupted run left, on every rank, and their record on rank 0; None if there are none."""
    file = video.files.latents
    record: dict[str, Any] = {}
    data = b""
    if engine.is_first and file.exists():
        record = read_record(load_latents(file)[1], file)
        data = file.read_bytes()
    data = hand_out_bytes(engine.mesh, data, "latents")
    return (safetensors.torch.load(data)["latents"], record) if data else (None, record)
