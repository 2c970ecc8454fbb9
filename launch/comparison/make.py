"""Make the missing videos of a comparison with one loaded engine on all ranks."""

import dataclasses
from collections.abc import Sequence

from engine.batch.locks import Shard
from engine.batch.make import ItemMaker
from engine.batch.variants import Variant
from engine.engine import LongVideoEngine
from engine.files.say import say_on_stderr
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError
from engine.planner.model import read_model
from engine.ranks.arrange import check_settings
from engine.ranks.layouts import check_layout
from launch.batching.report import check_room
from launch.batching.work import Prepare
from launch.comparison.kept_measures import read_kept
from launch.comparison.store import Comparison, Video, record_of
from launch.ranks.join import DistContext
from launch.video.make import explain_denoising, summary


def check_variants(variants: Sequence[Variant], context: DistContext) -> None:
    """Raise UserError for variants that the model or these ranks cannot run, before weights are read."""
    spec = read_model(variants[0].config.model)
    for variant in variants:
        config, video = variant.config, variant.config.video
        spec.video.check_video(video.num_frames, video.height, video.width)
        check_settings(config, spec)
        if context.ranks is not None:
            check_layout(variant.label, config.method.method, context.ranks.degrees)


def missing_videos(
    comparison: Comparison, context: DistContext, shard: Shard | None = None, *, at_once: int = 1
) -> list[Video]:
    """Return the videos (of a shard) that are neither finished nor in the kept measures, by rank 0's files.

    Deletes leftovers of killed processes. `at_once` videos are made at a time.
    """
    videos = comparison.videos_of(shard or Shard())

    def look() -> list[bool]:
        kept = read_kept(comparison)
        done = [video.key in kept or video.check() for video in videos]
        items = {
            wanted: [v.item for v, is_done in zip(videos, done, strict=True) if is_done is wanted]
            for wanted in (True, False)
        }
        comparison.batch_files.tidy(done=items[True], todo=items[False])
        if items[False]:
            config = comparison.config
            model = dataclasses.replace(config.model, device=comparison.batch.device)
            config = dataclasses.replace(config, model=model)
            check_room(comparison.batch_files, config, items[False], replicas=at_once, keep_latents=False)
        return done

    done = context.ask_first(look)
    return [video for video, is_done in zip(videos, done, strict=True) if not is_done]


def make_missing(
    engine: LongVideoEngine, comparison: Comparison, missing: Sequence[Video], context: DistContext
) -> None:
    """Make these videos one by one; rank 0 prints a line for each."""
    suite = comparison.batch.suite
    prepare = Prepare(suite={"name": suite.name, "sha256": suite.sha256})
    maker = ItemMaker(
        engine=engine,
        configs={variant.label: variant.config for variant in comparison.variants},
        root=comparison.folder,
        checkpoint_every=engine.config.output.checkpoint_every,
        keep_latents=False,
        sheets=True,
    )
    for index, video in enumerate(missing):
        if index > 0:
            context.wait_for_first(f"{missing[index - 1].files.video} made")
        context.check_on_first(lambda video=video: _drop_damaged(video))
        with explain_denoising(video.files, engine, doing="making a video"):
            sidecar = maker.make(prepare(video.item, 1, "this process"))
        if sidecar is not None:
            print(f"{index + 1} of {len(missing)}, {summary(record_of(sidecar), video.files)}", flush=True)


def _drop_damaged(video: Video) -> None:
    """Delete the checkpoint of an unfinished video if it is damaged."""
    try:
        read_metadata(video.files.checkpoint)
    except DamagedError as error:
        say_on_stderr(f"{error.reason}; it is made again")
        video.files.checkpoint.unlink()
