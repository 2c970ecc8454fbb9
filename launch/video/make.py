"""Make the files of one prompt, continuing an earlier run; an early end reports what was kept."""

import safetensors.torch
from torch import Tensor

from engine.batch.files import ItemFiles
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import load_latents
from engine.files.whole import describe_error
from engine.given.frames import GivenFrames
from engine.produce import LatentsFile, Record, decode_to_files, denoise_to_file, share_decoding
from engine.ranks.agreement import broadcast_bytes
from engine.spectra.plot import write_trace
from engine.spectra.trace import SpectralTrace
from launch.video.interruptions import describe_kept, explain_decoding, explain_denoising
from launch.video.latents_record import decoded_by, read_record
from launch.video.outputs import OutputFiles
from launch.video.stages import Stage


def make_video(
    engine: LongVideoEngine,
    config: RunConfig,
    prompt: str,
    files: OutputFiles,
    *,
    given: GivenFrames | None = None,
    stage: Stage = "denoise",
    replace: bool,
) -> Record | None:
    """Make the files of one prompt, starting at its stage; returns the record on rank 0, which writes them. Every rank calls this.

    `config`: that of the engine, but for the number of frames, which is this video's.
    `replace`: whether existing files are replaced.
    """
    if stage == "decode":
        latents, record = _read_latents(engine, config, files)
    else:
        latents, record = _denoise(
            engine,
            prompt,
            files,
            given,
            num_frames=config.video.num_frames,
            replace=replace,
            replace_latents=stage == "trace",
        )
    if not engine.is_first:
        share_decoding(engine.decoder, latents, seed=config.sampler.seed)
        return None
    with explain_decoding(files, engine.device):
        record = decode_to_files(engine.decoder, latents, record, files.decoding, replace=replace)
    for path in (files.snapshot, *(() if files.keep_latents else (files.latents,))):
        path.unlink(missing_ok=True)
    return record


def summary(record: Record, files: OutputFiles | ItemFiles) -> str:
    """One line about a finished video."""
    modes = [step["mode"] for step in record["steps"]]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in dict.fromkeys(modes))
    cached = sum(step.get("cached", False) for step in record["steps"])
    counts += f" ({cached} of all {len(modes)} from the cache)" if cached else ""
    seconds = record["seconds"]
    resumed = f" (continued after step {record['resumed_at']})" if record["resumed_at"] else ""
    return (
        f"{files.video}: {record['video']['num_frames']} frames; "
        f"denoised in {seconds['denoise']:.1f} s, steps: {counts or 'none left'}{resumed}; "
        f"decoded in {seconds['decode']:.1f} s"
    )


def _read_latents(engine: LongVideoEngine, config: RunConfig, files: OutputFiles) -> tuple[Tensor, Record]:
    """Read the latents of an earlier run, on every rank, and their record on rank 0."""
    record: Record = {}
    data = b""
    if engine.is_first:
        record = read_record(load_latents(files.latents)[1], files.latents)
        record = record | {"config": record["config"] | decoded_by(config)}
        data = files.latents.read_bytes()
    data = broadcast_bytes(engine.mesh, data, "latents")
    return safetensors.torch.load(data)["latents"], record


def _denoise(
    engine: LongVideoEngine,
    prompt: str,
    files: OutputFiles,
    given: GivenFrames | None,
    *,
    num_frames: int,
    replace: bool,
    replace_latents: bool,
) -> tuple[Tensor, Record]:
    """Denoise: latents on every rank, and their record on rank 0, which writes both, and the trace if there is one."""
    trace = SpectralTrace() if files.trace else None
    # The record of a finished run would mean that nothing is left to make.
    outdated = files.record if replace else None
    kept = LatentsFile(path=files.latents, outdated=outdated, replace=replace or replace_latents)
    with explain_denoising(files, engine):
        latents, record = denoise_to_file(
            engine,
            prompt,
            file=kept,
            num_frames=num_frames,
            given=given,
            snapshot=files.snapshot,
            snapshot_every=engine.config.output.snapshot_every,
            trace=trace,
        )
    if engine.is_first:
        if trace is not None:
            _write_trace(trace, files, replace=replace)
        files.snapshot.unlink(missing_ok=True)  # the latents hold all of it
    return latents, record


def _write_trace(trace: SpectralTrace, files: OutputFiles, *, replace: bool) -> None:
    try:
        write_trace(trace.rows, files.trace_table, files.trace_plot, replace=replace)
    except OSError as error:
        raise UserError(f"{describe_error(error, files.trace_table)}; {describe_kept(files)}") from error
