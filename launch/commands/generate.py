"""generate.py: prompts to videos, on one rank or several."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.given.frames import GivenFrames
from engine.load.checkpoint import Checkpoint, open_checkpoint
from engine.shown import quoted
from launch.arguments.generate import Arguments
from launch.process.stopping import all_is_made
from launch.ranks.join import open_ranks
from launch.video.make import make_video, summary
from launch.video.outputs import OutputFiles, check_free_space, claim_outputs, frame_folders
from launch.video.prompts import look_at_given, look_at_prompts
from launch.video.stages import Stage, describe_finished, find_stage, read_record, remove_leftovers


def run(given: Arguments) -> None:
    """Join the ranks, claim the files, load the model once, and make what is missing of every video."""
    config, prompts, outputs = given.config, given.prompts, given.outputs
    if given.is_example:
        print(
            f"no --prompt and no --config: the embedded model makes its example, {quoted(prompts.texts[0])}", flush=True
        )
    with (
        contextlib.ExitStack() as last,
        open_ranks(config, prompts=prompts.texts, verbose=given.verbose) as context,
        contextlib.ExitStack() as stack,
    ):
        every, folders = [path for files in outputs for path in files.all], frame_folders(outputs)
        context.check_on_first(lambda: stack.enter_context(claim_outputs(every, flag="--output.path", folders=folders)))
        notes = context.ask_first(lambda: look_at_given(config, given.given))
        stages = context.ask_first(lambda: find_stages(prompts.texts, outputs, config, given.given))
        left = [each for each in zip(prompts.named, outputs, stages, strict=True) if each[2] != "finished"]
        if not left:
            return
        look_at_prompts(config, [named for named, _, _ in left], context, given=given.given)
        for note in notes:
            print(f"note: {note}", flush=True)
        engine = stack.enter_context(contextlib.closing(LongVideoEngine(config, context.ranks)))
        for index, ((_, prompt), files, stage) in enumerate(left):
            if index > 0:
                context.wait_for_first(f"video {index - 1}")
            record = make_video(
                engine, config, prompt, files, given=given.given, stage=stage, replace=config.output.overwrite
            )
            if record is not None:
                print(summary(record, files), flush=True)
        last.enter_context(all_is_made())


def find_stages(
    prompts: list[str], outputs: list[OutputFiles], config: RunConfig, given: GivenFrames | None = None
) -> list[Stage]:
    """Find what is left to make of each video, report finished ones, and check the space for the others."""
    settings_of = planned_settings(config, given)
    stages = [
        find_stage(files, config, functools.partial(settings_of, prompt))
        for prompt, files in zip(prompts, outputs, strict=True)
    ]
    left = [files for files, stage in zip(outputs, stages, strict=True) if stage != "finished"]
    for files in outputs:
        if files not in left and (record := read_record(files.record)) is not None:
            remove_leftovers(files, record)
            print(describe_finished(files, record), flush=True)
    if left:
        checkpoint, video = open_checkpoint(config.model), config.video
        size = video.num_frames, video.height, video.width
        checkpoint.spec.check_video(*size)
        check_free_space(left, config, checkpoint.spec.latent_shape(*size), model=checkpoint.folder)
    return stages


def planned_settings(config: RunConfig, given: GivenFrames | None) -> Callable[[str], dict[str, Any]]:
    """Return a function from a prompt to the settings of its latents, which reads the checkpoint on first use."""
    sampler, video = config.sampler, config.video
    call = {"negative_prompt": sampler.negative_prompt, "seed": sampler.seed, "num_frames": video.num_frames}

    @functools.cache
    def read() -> tuple[Checkpoint, dict[str, Any]]:
        checkpoint = open_checkpoint(config.model)
        if given is None:
            return checkpoint, call
        spec, size = checkpoint.spec, {"num_frames": video.num_frames, "fps": video.fps}
        settings = given.settings(**size, step=spec.temporal_factor, pictures=spec.pictures)
        return checkpoint, call | {"given": settings}

    def settings_of(prompt: str) -> dict[str, Any]:
        checkpoint, facts = read()
        return checkpoint.settings(config, prompt=prompt, **facts)

    return settings_of
