"""Make the missing videos of comparisons: on all ranks of this process with one loaded engine, or on replicas; facts of their model."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from engine.batch.locks import Shard, own_shard
from engine.batch.make import ItemMaker
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.devices import pick_device, pick_dtype
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.storage import writing_to
from engine.files.tensors import read_metadata
from engine.files.trees import DamagedError
from engine.load.checkpoint import open_checkpoint
from engine.planner.arrange import check_settings
from engine.planner.model import read_model
from engine.ranks.layouts import check_layout
from engine.shown import say_on_stderr
from evaluation.comparison.kept_measures import check_kept, read_kept
from evaluation.comparison.store import Comparison, ModelFacts, Video, record_of
from launch.arguments.replicas import Replicas
from launch.batching.messages import SUPPORT, check_room
from launch.batching.runner import make
from launch.batching.work import Prepare, Work
from launch.process.stopping import Stopped
from launch.ranks.join import DistContext, open_ranks
from launch.video.interruptions import explain_denoising
from launch.video.make import summary


def model_facts(config: RunConfig) -> ModelFacts:
    """What a comparison of these settings needs to know of its checkpoint; UserError for a video of a size that it cannot have."""
    checkpoint, model, video = open_checkpoint(config.model), config.model, config.video
    checkpoint.spec.check_video(video.num_frames, video.height, video.width)
    # A named device need not exist on the driver's machine.
    device = pick_device("auto") if model.device == "auto" else torch.device(model.device)
    return ModelFacts(
        digest=checkpoint.digest,
        dtype=str(pick_dtype(model.dtype, device)).removeprefix("torch."),
        device=device.type,
        native_frames=checkpoint.spec.native_frames(config.method.window_frames),
    )


def check_longer(config: RunConfig, why: str) -> None:
    """Raise UserError for a video of native length or less; `why` explains why it is too short."""
    spec, native, video = open_checkpoint(config.model).spec, config.method.window_frames, config.video
    spec.check_video(video.num_frames, video.height, video.width)
    frames = spec.latent_shape(video.num_frames, video.height, video.width)[2] // spec.patch[0]
    if frames <= native:
        raise UserError(
            f"{video.num_frames} frames are {frames} latent frames, and the native window is {native}; {why}, such as "
            f"--video.num_frames {spec.native_frames(4 * native)} for four native lengths"
        )


@contextlib.contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Say that the videos in `folder` are kept if the block, which measures them, is interrupted."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(
            f"while measuring; every video that was made lies in {folder}; the same command continues"
        ) from error


class VideoMaker:
    """Makes the missing videos of comparisons that share a model; every rank of `context` has one.

    Attributes:
        config: settings of the engine.
        context: the ranks of this process.
        shard: its part of the videos.
    """

    def __init__(
        self,
        config: RunConfig,
        context: DistContext,
        stack: contextlib.ExitStack,
        *,
        replicas: Replicas | None = None,
        shard: Shard,
    ) -> None:
        self.config, self.context, self.shard = config, context, shard
        self._stack, self._replicas = stack, replicas
        self._engine: LongVideoEngine | None = None
        self._held: set[Path] = set()

    @property
    def engine(self) -> LongVideoEngine:
        """The engine of these ranks, loaded when it is first needed."""
        if self._engine is None:
            self._engine = self._stack.enter_context(LongVideoEngine(self.config, self.context.ranks))
        return self._engine

    def check(self, comparison: Comparison) -> None:
        """Raise UserError, on all ranks, for variants that the model or the ranks cannot run, or kept measures that cannot be used."""
        check_variants(comparison.variants, self.context)
        self.context.check_on_first(lambda: check_kept(comparison))

    def missing(self, comparison: Comparison) -> list[Video]:
        """Hold the folder, and return the videos that are to be made; all ranks call this."""
        context, folder = self.context, comparison.folder
        context.check_on_first(comparison.open)
        if folder not in self._held:
            self._held.add(folder)
            context.check_on_first(lambda: self._stack.enter_context(own_shard(folder, self.shard)))
        at_once = 1 if self._replicas is None else self._replicas.replicas
        return missing_videos(comparison, context, self.shard, at_once=at_once)

    def make(self, comparison: Comparison, missing: Sequence[Video] | None = None) -> None:
        """Make the missing videos; all ranks call this. GivenUpError if replicas give one up."""
        missing = self.missing(comparison) if missing is None else missing
        if missing and self._replicas is not None:
            drive(comparison, missing, self._replicas)
        elif missing:
            make_missing(self.engine, comparison, missing, self.context)


@contextlib.contextmanager
def open_maker(
    config: RunConfig, *, agree: Sequence[str], verbose: bool, replicas: Replicas | None, shard: Shard | None = None
) -> Iterator[VideoMaker]:
    """Join the ranks of this process, unless replicas make the videos; `agree` must be equal on all ranks."""
    with contextlib.ExitStack() as stack:
        context = DistContext()
        if replicas is None:
            context = stack.enter_context(open_ranks(config, prompts=agree, verbose=verbose))
        yield VideoMaker(config, context, stack, replicas=replicas, shard=shard or Shard())


def drive(comparison: Comparison, missing: Sequence[Video], replicas: Replicas) -> None:
    """Make these videos on replicas, including those given up before."""
    items, files = tuple(video.item for video in missing), comparison.batch_files
    for item in items:
        files.release(item)
    replicas = dataclasses.replace(replicas, out=comparison.folder.absolute())
    with writing_to(comparison.folder, after=SUPPORT):
        make(comparison.config, replicas, comparison.batch, files, Work(done=(), given_up=(), todo=items))


def check_variants(variants: Sequence[Variant], context: DistContext) -> None:
    """Raise UserError for variants that the model or these ranks cannot run, before weights are read."""
    spec = read_model(variants[0].config.model)
    for variant in variants:
        config, video = variant.config, variant.config.video
        spec.video.check_video(video.num_frames, video.height, video.width)
        check_settings(config, spec)
        if context.ranks is not None:
            check_layout(variant.label, config.method.method, context.ranks.degrees)


def missing_videos(comparison: Comparison, context: DistContext, shard: Shard, *, at_once: int) -> list[Video]:
    """Return the videos of a shard that are neither finished nor in the kept measures, by rank 0's files.

    Deletes leftovers of killed processes. `at_once` videos are made at a time.
    """
    videos = comparison.videos_of(shard)

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

    done = context.compute_on_first(look)
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
        snapshot_every=engine.config.output.snapshot_every,
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
    """Delete the snapshot of an unfinished video if it is damaged."""
    try:
        read_metadata(video.files.snapshot)
    except DamagedError as error:
        say_on_stderr(f"{error.reason}; it is made again")
        video.files.snapshot.unlink()
