"""generate.py: prompts to videos, on one rank or several."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from safetensors import safe_open

from engine.checkpoint import save_latents
from engine.config import RunConfig
from engine.engine import Denoised, LongVideoEngine
from engine.errors import UserError, describe_out_of_memory, is_out_of_memory
from engine.record import build_record
from engine.trace import Trace
from engine.trace_plot import write_trace
from launch.arguments.generate import Arguments, check_free, read
from launch.command import LostRankError
from launch.outputs import OutputFiles
from launch.ranks import open_ranks
from launch.render import describe_kept, render
from launch.stopping import Stopped
from parallel.collectives import CollectiveError


def main(argv: list[str]) -> None:
    """Read the command line and make the videos."""
    run(read(argv))


def run(given: Arguments) -> None:
    """Meet the other ranks if there are any, check the outputs, load the model once, make every video."""
    config, prompts, outputs = given.config, given.prompts, given.outputs
    with open_ranks(config, prompts=prompts, verbose=given.verbose) as party:
        party.check_on_first(lambda: check_free(outputs, config.output))
        with contextlib.closing(LongVideoEngine(config, party.ranks)) as engine:
            for index, (prompt, files) in enumerate(zip(prompts, outputs, strict=True)):
                if index > 0:
                    party.wait_for_first(f"video {index - 1}")
                record = make_video(engine, config, prompt, files)
                if record is not None:
                    print(summary(record, files), flush=True)


def make_video(engine: LongVideoEngine, config: RunConfig, prompt: str, files: OutputFiles) -> dict[str, Any] | None:
    """One prompt from noise to its files; returns the record, on rank 0, which writes them. Every rank calls this."""
    trace = Trace() if files.trace else None
    denoised = _denoise(engine, prompt, files, trace)
    if not engine.is_first:
        for _ in engine.decode(denoised.latents, seed=config.sampler.seed):  # its share of the tiles, if there are any
            pass
        return None
    seconds = {"load": engine.load_seconds, **denoised.seconds}
    record = _keep_latents(
        lambda: build_record(
            engine, prompt=prompt, seed=None, negative_prompt=None, denoised=denoised, seconds=seconds
        ),
        denoised,
        files,
    )
    if trace is not None:
        _write_trace(trace, files)
    record = render(engine, denoised.latents, record, files, output=config.output, fps=config.video.fps)
    if not files.keep_latents:
        files.latents.unlink()
    return record


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


def _denoise(engine: LongVideoEngine, prompt: str, files: OutputFiles, trace: Trace | None) -> Denoised:
    try:
        return engine.denoise(prompt, checkpoint=files.checkpoint, trace=trace)
    except KeyboardInterrupt as error:
        raise Stopped(_describe_checkpoint(files)) from error
    except CollectiveError as error:
        kept = f"; {_describe_checkpoint(files)}" if engine.is_first else ""
        raise LostRankError(f"{error}{kept}") from error
    except OSError as error:
        raise UserError(f"cannot write {files.checkpoint}: {error.strerror or error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(describe_out_of_memory(error, when=f"denoising on {engine.device}")) from error


def _describe_checkpoint(files: OutputFiles) -> str:
    """What was kept of a run that ended while denoising, and how to go on."""
    if not files.checkpoint.exists():
        return "before the first step was done; nothing was kept"
    with safe_open(files.checkpoint, framework="pt") as file:
        step = file.metadata()["step"]
    # The same command would find the videos of earlier prompts, and not replace them.
    how = f"this prompt alone, with --output.path {files.video}," if files.of_several else "the same command"
    return f"after step {step}, which is kept in {files.checkpoint}; {how} continues from there"


def _keep_latents(make_record: Callable[[], dict[str, Any]], denoised: Denoised, files: OutputFiles) -> dict[str, Any]:
    """Write the latents before anything is decoded, since they are what took long; returns the record so far.

    The record lies in the file too, so that a video decoded from it later has its whole record.
    """

    def write() -> dict[str, Any]:
        record = make_record()
        save_latents(files.latents, denoised.latents, {"record": json.dumps(record, allow_nan=False)})
        files.checkpoint.unlink(missing_ok=True)  # the steps have served
        return record

    try:
        return write()
    except KeyboardInterrupt as error:
        write()  # interruptions wait while one is handled, so this time it is written
        raise Stopped(f"before decoding; {describe_kept(files)}") from error
    except OSError as error:
        raise UserError(f"cannot write {files.latents}: {error.strerror or error}") from error


def _write_trace(trace: Trace, files: OutputFiles) -> None:
    try:
        write_trace(trace.rows, files.trace_table, files.trace_plot)
    except OSError as error:
        raise UserError(
            f"cannot write {files.trace_table}: {error.strerror or error}; {describe_kept(files)}"
        ) from error
