"""Messages for a decode that ends early, with the command to continue."""

import contextlib
import shlex
from collections.abc import Iterator

import torch

from engine.errors import UserError, is_out_of_memory
from engine.files.whole import describe_error
from launch.process.exit_codes import LostRankError
from launch.process.stopping import Stopped
from launch.video.outputs import OutputFiles
from parallel.collectives import CollectiveError


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
