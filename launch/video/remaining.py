"""Find the remaining stages of the videos of one command, from the snapshots and the files of earlier runs."""

import functools
from collections.abc import Callable
from typing import Any

from engine.config import RunConfig
from engine.files.tensors import take_former_name
from engine.given.frames import GivenFrames
from engine.load.checkpoint import Checkpoint, open_checkpoint
from launch.video.outputs import OutputFiles, check_free_space
from launch.video.stages import Stage, describe_finished, find_stage, read_record, remove_leftovers


def find_stages(
    prompts: list[str], outputs: list[OutputFiles], config: RunConfig, given: GivenFrames | None = None
) -> list[Stage]:
    """Find the remaining stages of each video, report finished ones, and check the space for the others."""
    for files in outputs:
        take_former_name(files.snapshot)
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
