"""generate.py: prompts to videos, on one rank or several."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from engine.checkpoint import kept_steps, load_latents, save_latents
from engine.config import RunConfig
from engine.engine import Denoised, LongVideoEngine
from engine.errors import UserError, describe_out_of_memory, is_out_of_memory
from engine.files.whole import describe_error
from engine.given import GivenFrames
from engine.identity import latents_settings
from engine.known import check_given
from engine.load.pipeline import fetch, find_adapter, pick_device, pick_dtype, read_spec
from engine.paths import find_checkpoint
from engine.ranks import broadcast_bytes, fingerprints
from engine.record import build_record
from engine.shown import quoted
from engine.spectra.plot import write_trace
from engine.spectra.trace import SpectralTrace
from launch.arguments.generate import Arguments, read
from launch.commands.decode import decoded_by
from launch.commands.decode import read_record as read_record_of_latents
from launch.exit_codes import LostRankError
from launch.outputs import OutputFiles, check_free_space, claim_outputs, frame_folders
from launch.prompts import look_at_prompts
from launch.ranks import open_ranks
from launch.render import describe_kept, render
from launch.stages import Stage, describe_finished, find_stage, read_record, remove_leftovers
from launch.stopping import Stopped, all_is_made
from parallel.collectives import CollectiveError


def main(argv: list[str]) -> None:
    """Read the command line and make the videos."""
    run(read(argv))


def run(given: Arguments) -> None:
    """Meet the other ranks if there are any, claim the files, load the model once, make what is missing of every video."""
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
        look_at_prompts(config, [named for named, _, _ in left], context)
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


def look_at_given(config: RunConfig, given: GivenFrames | None) -> list[str]:
    """Look at the frames that are given before anything is loaded; returns what there is to say of them, a sentence each."""
    if given is None:
        return []
    video, spec = config.video, read_spec(checkpoint_folder(config))
    size = {"num_frames": video.num_frames, "height": video.height, "width": video.width}
    return check_given(given, spec, **size, fps=video.fps)


def checkpoint_folder(config: RunConfig) -> Path:
    """The checkpoint's folder, with the small files that say what it is."""
    return fetch(find_checkpoint(config.model.path), config.model.revision, parts=(), offline=config.model.offline)


def find_stages(
    prompts: list[str], outputs: list[OutputFiles], config: RunConfig, given: GivenFrames | None = None
) -> list[Stage]:
    """What is left to make of each video, see `launch.stages`; says which are finished, and checks the space for the others."""
    facts = functools.cache(lambda: planned_facts(config, given))

    def settings_of(prompt: str) -> dict[str, Any]:
        return latents_settings(config, prompt=prompt, **facts())

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
        folder, video = checkpoint_folder(config), config.video
        spec, size = read_spec(folder), (video.num_frames, video.height, video.width)
        spec.check_video(*size)
        check_free_space(left, config, spec.latent_shape(*size), model=folder)
    return stages


def planned_facts(config: RunConfig, given: GivenFrames | None) -> dict[str, Any]:
    """What decides latents beside configuration and prompt, as `latents_settings` takes it, before anything is loaded."""
    folder = checkpoint_folder(config)
    from_hub = isinstance(find_checkpoint(config.model.path), str)
    device, sampler, video = pick_device(config.model.device), config.sampler, config.video
    facts = {
        "checkpoint": fingerprints(config, folder, from_hub=from_hub)["checkpoint"].hex(),
        "dtype": str(pick_dtype(config.model.dtype, device)),
        "device": device.type,
        "with_rate": find_adapter(folder).frame_rate_matters,
        "negative_prompt": sampler.negative_prompt,
        "seed": sampler.seed,
        "num_frames": video.num_frames,
    }
    if given is not None:
        step = read_spec(folder).temporal_factor
        facts["given"] = given.settings(num_frames=video.num_frames, fps=video.fps, step=step)
    return facts


def make_video(
    engine: LongVideoEngine,
    config: RunConfig,
    prompt: str,
    files: OutputFiles,
    *,
    given: GivenFrames | None = None,
    stage: Stage = "denoise",
    replace: bool,
) -> dict[str, Any] | None:
    """One prompt to its files, from its stage on; returns the record, on rank 0, which writes them. Every rank calls this.

    `replace`: whether files that are there are replaced.
    """
    if stage == "decode":
        latents, record = _read_latents(engine, config, files)
    else:
        latents, record = _make_latents(engine, prompt, files, given, replace=replace, replace_latents=stage == "trace")
    if not engine.is_first:
        for _ in engine.decode(latents, seed=config.sampler.seed):  # its share of the tiles, if there are any
            pass
        return None
    record = render(engine, latents, record, files, output=config.output, fps=config.video.fps, replace=replace)
    for path in (files.checkpoint, *(() if files.keep_latents else (files.latents,))):
        path.unlink(missing_ok=True)
    return record


def _read_latents(engine: LongVideoEngine, config: RunConfig, files: OutputFiles) -> tuple[Tensor, dict[str, Any]]:
    """Latents that an earlier run has left, on every rank, and their record on rank 0."""
    record: dict[str, Any] = {}
    data = b""
    if engine.is_first:
        record = read_record_of_latents(load_latents(files.latents)[1], files.latents)
        record = record | {"config": record["config"] | decoded_by(config)}
        data = files.latents.read_bytes()
    data = broadcast_bytes(engine.mesh, data, "latents")
    return safetensors.torch.load(data)["latents"], record


def _make_latents(
    engine: LongVideoEngine,
    prompt: str,
    files: OutputFiles,
    given: GivenFrames | None,
    *,
    replace: bool,
    replace_latents: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and the record so far on rank 0, where both are written, and the trace if there is one."""
    trace = SpectralTrace() if files.trace else None
    denoised = _denoise(engine, prompt, files, given, trace)
    if not engine.is_first:
        return denoised.latents, {}
    seconds = {"load": engine.load_seconds, **denoised.seconds}
    record = _keep_latents(
        lambda: build_record(
            engine, prompt=prompt, seed=None, negative_prompt=None, denoised=denoised, seconds=seconds
        ),
        denoised,
        files,
        replace=replace,
        replace_latents=replace_latents,
    )
    if trace is not None:
        _write_trace(trace, files, replace=replace)
    files.checkpoint.unlink(missing_ok=True)  # the steps have served
    return denoised.latents, record


def summary(record: dict[str, Any], files: OutputFiles) -> str:
    """One line for the person who waited."""
    modes = [step["mode"] for step in record["steps"]]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
    seconds = record["seconds"]
    resumed = f" (continued after step {record['resumed_at']})" if record["resumed_at"] else ""
    return (
        f"{files.video}: {record['video']['num_frames']} frames; "
        f"denoised in {seconds['denoise']:.1f} s, steps: {counts or 'none left'}{resumed}; "
        f"decoded in {seconds['decode']:.1f} s"
    )


def _denoise(
    engine: LongVideoEngine, prompt: str, files: OutputFiles, given: GivenFrames | None, trace: SpectralTrace | None
) -> Denoised:
    try:
        return engine.denoise(
            prompt,
            given=given,
            checkpoint=files.checkpoint,
            checkpoint_every=engine.config.output.checkpoint_every,
            trace=trace,
        )
    except KeyboardInterrupt as error:
        raise Stopped(_describe_checkpoint(files, "before the first step was done; nothing was kept")) from error
    except CollectiveError as error:
        kept = f"; {_describe_checkpoint(files)}" if engine.is_first else ""
        raise LostRankError(f"{error}{kept}") from error
    except OSError as error:
        raise UserError(f"{describe_error(error, files.checkpoint)}; {_describe_checkpoint(files)}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kept = f"; {_describe_checkpoint(files)}" if engine.is_first and files.checkpoint.exists() else ""
        raise UserError(f"{describe_out_of_memory(error, when=f'denoising on {engine.device}')}{kept}") from error


def _describe_checkpoint(files: OutputFiles, otherwise: str = "nothing was kept") -> str:
    """What was kept of a run that ended while denoising, and how to go on; `otherwise` if there is no checkpoint."""
    if not files.checkpoint.exists():
        return otherwise
    return f"after step {kept_steps(files.checkpoint)}, which is kept in {files.checkpoint}; the same command continues from there"


def _keep_latents(
    make_record: Callable[[], dict[str, Any]],
    denoised: Denoised,
    files: OutputFiles,
    *,
    replace: bool,
    replace_latents: bool,
) -> dict[str, Any]:
    """Write the latents before anything is decoded, since they are what took long; returns the record so far.

    The record lies in the file too, so that a video decoded from it later has its whole record.
    """

    def write() -> dict[str, Any]:
        record = make_record()
        if replace:  # the record of a finished run says that there is nothing left to make
            files.record.unlink(missing_ok=True)
        metadata = {"record": json.dumps(record, allow_nan=False)}
        save_latents(files.latents, denoised.latents, metadata, replace=replace or replace_latents)
        return record

    try:
        return write()
    except KeyboardInterrupt as error:
        write()  # interruptions wait while one is handled, so this time it is written
        raise Stopped(f"before decoding; {describe_kept(files)}") from error
    except OSError as error:
        raise UserError(f"{describe_error(error, files.latents)}; {_describe_checkpoint(files)}") from error


def _write_trace(trace: SpectralTrace, files: OutputFiles, *, replace: bool) -> None:
    try:
        write_trace(trace.rows, files.trace_table, files.trace_plot, replace=replace)
    except OSError as error:
        raise UserError(f"{describe_error(error, files.trace_table)}; {describe_kept(files)}") from error
