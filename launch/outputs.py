"""Which files a run writes, and the checks that they can be written, made before anything is loaded or computed."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import OutputConfig
from engine.errors import UserError
from engine.paths import expand


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """The files of one video.

    Attributes:
        video: the mp4, whose stem the other files share.
        latents: safetensors file of the latents.
        keep_latents: whether that file stays once the video is whole.
        trace: whether effective rank and fusion weights are written.
        of_several: whether the run makes other videos too.
    """

    video: Path
    latents: Path
    keep_latents: bool = False
    trace: bool = False
    of_several: bool = False

    @property
    def record(self) -> Path:
        """JSON record of the run."""
        return self.video.with_suffix(".json")

    @property
    def sheet(self) -> Path:
        """Contact sheet."""
        return self.video.with_suffix(".png")

    @property
    def checkpoint(self) -> Path:
        """State of a denoising run that was interrupted."""
        return self.video.with_suffix(".checkpoint.safetensors")

    @property
    def trace_table(self) -> Path:
        """Effective rank and fusion weights."""
        return self.video.with_suffix(".trace.csv")

    @property
    def trace_plot(self) -> Path:
        """Plot of the same."""
        return self.video.with_suffix(".trace.png")

    @property
    def all(self) -> list[Path]:
        """Every file that the run writes except its checkpoint, which it may find and continue from."""
        traces = [self.trace_table, self.trace_plot] if self.trace else []
        return [self.video, self.record, self.sheet, self.latents, *traces]


def plan_outputs(config: OutputConfig, num_videos: int) -> list[OutputFiles]:
    """The files of each video; with several, `-000`, `-001`, ... is added to the stems."""
    if config.save_latents is not None and not config.save_latents.endswith(".safetensors"):
        raise UserError(f"output.save_latents must end in .safetensors, got {config.save_latents!r}")
    video = expand(config.path)
    latents = expand(config.save_latents) if config.save_latents is not None else latents_beside(video)
    outputs = [
        OutputFiles(
            video=video.with_stem(video.stem + suffix),
            latents=latents.with_stem(latents.stem + suffix) if config.save_latents else latents_beside(video, suffix),
            keep_latents=config.save_latents is not None,
            trace=config.trace,
            of_several=num_videos > 1,
        )
        for suffix in ([f"-{i:03d}" for i in range(num_videos)] if num_videos > 1 else [""])
    ]
    for files in outputs:
        others = {files.video, files.record, files.sheet, files.checkpoint, files.trace_table, files.trace_plot}
        if files.latents in others:
            raise UserError(
                f"output.save_latents {files.latents} is also another file of this video; choose another name"
            )
    return outputs


def latents_beside(video: Path, suffix: str = "") -> Path:
    """Where the latents of a video wait until it is whole."""
    return video.with_name(f"{video.stem}{suffix}.latents.safetensors")


def check_outputs(paths: Sequence[Path], *, overwrite: bool, overwrite_flag: str) -> None:
    """Raise UserError if a file exists that may not be replaced, or a folder cannot be made or written to."""
    for path in paths:
        try:
            _check_free(path, overwrite, overwrite_flag)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    for folder in _folders(paths):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error


def _check_free(path: Path, overwrite: bool, overwrite_flag: str) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        latents = ", or make the video from it with launch/decode.py" if path.suffix == ".safetensors" else ""
        raise UserError(f"{path} exists already; choose another name or add {overwrite_flag}{latents}")


def _folders(paths: Sequence[Path]) -> Iterator[Path]:
    yield from dict.fromkeys(path.parent for path in paths)
