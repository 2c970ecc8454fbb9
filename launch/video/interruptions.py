"""Messages of a run that is stopped or fails: what was kept, and the command that continues."""

import contextlib
import shlex
from collections.abc import Iterator

import torch

from engine.batch.files import ItemFiles
from engine.denoise.snapshot import kept_steps
from engine.engine import LongVideoEngine
from engine.errors import UserError, describe_out_of_memory, is_out_of_memory
from engine.files.whole import describe_error
from engine.produce import LatentsKept
from launch.process.exit_codes import LostRankError
from launch.process.stopping import Stopped
from launch.video.outputs import OutputFiles
from parallel.collectives import CollectiveError


@contextlib.contextmanager
def explain_denoising(
    files: OutputFiles | ItemFiles, engine: LongVideoEngine, *, doing: str = "denoising"
) -> Iterator[None]:
    """If the block is stopped or fails, report which steps were kept and how to continue; `doing` describes the block."""
    try:
        yield
    except LatentsKept as error:
        raise Stopped(f"before decoding; {describe_kept(files)}") from error
    except KeyboardInterrupt as error:
        cache = engine.config.sampler.cache
        nothing = "before the first step was finished; nothing was kept"
        if cache != "none":
            nothing = f"nothing was kept: with sampler.cache {cache} a run starts over"
        raise Stopped(_describe_snapshot(files, nothing)) from error
    except CollectiveError as error:
        kept = f"; {_describe_snapshot(files)}" if engine.is_first else ""
        raise LostRankError(f"{error}{kept}") from error
    except OSError as error:
        raise UserError(f"{describe_error(error, files.snapshot)}; {_describe_snapshot(files)}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kept = f"; {_describe_snapshot(files)}" if engine.is_first and files.snapshot.exists() else ""
        message = describe_out_of_memory(
            error, when=f"{doing} on {engine.device}", of_folder=isinstance(files, ItemFiles)
        )
        raise UserError(f"{message}{kept}") from error


def _describe_snapshot(files: OutputFiles | ItemFiles, otherwise: str = "nothing was kept") -> str:
    """The message about a run that ended while denoising, and how to continue; `otherwise` without a snapshot."""
    if not files.snapshot.exists():
        return otherwise
    return f"after step {kept_steps(files.snapshot)}, which is kept in {files.snapshot}; the same command continues from there"


@contextlib.contextmanager
def explain_decoding(files: OutputFiles, device: torch.device) -> Iterator[None]:
    """Report how to continue from `files.latents` if decoding in the block is stopped or fails."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"while decoding; {describe_kept(files)}") from error
    except CollectiveError as error:
        raise LostRankError(f"{error}; {describe_kept(files)}") from error
    except OSError as error:
        is_whole = files.video.exists() and str(error.filename) != str(files.video)
        whole = f"{files.video} is whole; " if is_whole else ""
        raise UserError(f"{describe_error(error, files.video)}; {whole}{describe_kept(files)}") from error
    except BaseException as error:
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory while decoding on {device}; {describe_kept(files)} --decode.mode tiled"
            ) from error
        error.add_note(describe_kept(files))
        raise


def describe_kept(files: OutputFiles) -> str:
    """Describe where the latents are, and the command that decodes them."""
    command = ["python", "launch/decode.py", str(files.latents), "--output", files.name]
    if any(path.exists() for path in (files.video, files.sheet, files.record)):
        command.append("--overwrite")
    return (
        f"the latents are kept in {files.latents}; the same command continues from them, or make the video with: "
        f"{shlex.join(command)}"
    )
