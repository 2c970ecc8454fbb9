"""The output files of a run, and checks before anything is loaded that they can be written."""

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config import VIDEO_KINDS, OutputConfig, RunConfig, VideoKind
from engine.errors import UserError
from engine.files.checks import check_places, check_space, least_video_bytes, snapshot_bytes
from engine.files.claims import claim
from engine.files.folders import is_empty_folder
from engine.files.tensors import former_name
from engine.files.video import VideoFiles
from engine.paths import expand


@dataclass(frozen=True, kw_only=True)
class OutputFiles:
    """The files of one video.

    Attributes:
        video: the video, whose stem the other files share: a file, or a folder of PNG frames, whose name has no ending.
        latents: safetensors file of the latents.
        keep_latents: whether that file stays once the video is complete.
        trace: whether effective rank and fusion weights are written.
    """

    video: Path
    latents: Path
    keep_latents: bool = False
    trace: bool = False

    @property
    def kind(self) -> VideoKind:
        """The kind of video, by its ending."""
        return VIDEO_KINDS[self.video.suffix]

    @property
    def name(self) -> str:
        """The video as a command line names it."""
        return f"{self.video}/" if self.kind == "png" else str(self.video)

    @property
    def record(self) -> Path:
        """JSON record of the run, written last."""
        return self.video.with_suffix(".json")

    @property
    def sheet(self) -> Path:
        """Contact sheet."""
        return self.video.with_suffix(".png")

    @property
    def snapshot(self) -> Path:
        """State of a run that is denoising."""
        return self.video.with_suffix(".snapshot.safetensors")

    @property
    def trace_table(self) -> Path:
        """Effective rank and fusion weights."""
        return self.video.with_suffix(".trace.csv")

    @property
    def trace_plot(self) -> Path:
        """Plot of the same."""
        return self.video.with_suffix(".trace.png")

    @property
    def traces(self) -> list[Path]:
        """Table and plot of the trace, if they are written."""
        return [self.trace_table, self.trace_plot] if self.trace else []

    @property
    def decoded(self) -> list[Path]:
        """The files that are made from latents."""
        return [self.video, self.sheet, self.record]

    @property
    def decoding(self) -> VideoFiles:
        """The same, for `engine.produce.decode_to_files`."""
        return VideoFiles(video=self.video, kind=self.kind, sheet=self.sheet, record=self.record)

    @property
    def all(self) -> list[Path]:
        """Every file that the run writes."""
        return [*self.decoded, self.latents, self.snapshot, *self.traces]


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
        )
        for suffix in ([f"-{i:03d}" for i in range(num_videos)] if num_videos > 1 else [""])
    ]
    for files in outputs:
        others = {*files.decoded, files.snapshot, former_name(files.snapshot), files.trace_table, files.trace_plot}
        if files.latents in others:
            raise UserError(
                f"output.save_latents {files.latents} is also another file of this video; choose another name"
            )
    return outputs


def latents_beside(video: Path, suffix: str = "") -> Path:
    """The latents file beside a video, which is kept until the video is complete."""
    return video.with_name(f"{video.stem}{suffix}.latents.safetensors")


@contextlib.contextmanager
def claim_outputs(paths: Sequence[Path], *, flag: str, folders: Collection[Path] = ()) -> Iterator[None]:
    """Check that files can be written, and claim them for the block; `flag` is the option to choose others.

    `folders` are those of the paths that will be folders of frames.

    Raises:
        UserError: a folder cannot be made or written to, a name is too long, or another run writes one of the files.
    """
    check_places(paths, folders=folders)
    with claim(paths, advice=f"choose another {flag}"):
        yield


def frame_folders(outputs: Sequence[OutputFiles]) -> list[Path]:
    """The videos that are folders of frames."""
    return [files.video for files in outputs if files.kind == "png"]


def refuse_existing(paths: Sequence[Path], overwrite_flag: str) -> None:
    """Raise UserError if one of the files exists; an empty folder, which frames may take, does not count."""
    for path in paths:
        if os.path.lexists(path) and not is_empty_folder(path):
            raise UserError(describe_existing(path, overwrite_flag))


def describe_existing(path: Path, overwrite_flag: str, differences: str | None = None) -> str:
    """The message for a file that exists, with the settings in which it differs."""
    latents = ", or make the video from it with launch/decode.py" if path.suffix == ".safetensors" else ""
    other = f"; it was made with other settings: {differences}" if differences else ""
    return f"{path} exists already; choose another name or add {overwrite_flag}{latents}{other}"


def check_free_space(
    outputs: Sequence[OutputFiles], config: RunConfig, latent_shape: Sequence[int], *, model: Path
) -> None:
    """Raise UserError unless the disks have room for these videos and the work on one of them.

    Existing files of an earlier run are not counted again. `latent_shape` is that of one video's latents, stored in fp32,
    `model` the folder of the checkpoint.
    """
    video, every = config.video, config.output.snapshot_every
    latents = 4 * math.prod(latent_shape)
    size = video.num_frames, video.height, video.width
    needed = {files.video: least_video_bytes(*size, kind=files.kind) for files in outputs}
    needed |= {files.latents: latents for files in outputs if files.keep_latents and not files.latents.exists()}
    for files in outputs[:1]:
        if files.latents.exists():  # only decoding is left
            continue
        # Another snapshot is written beside the one before; the last one is deleted once the latents lie beside it.
        state = snapshot_bytes(model, latents) if every else 0
        first = 0 if files.snapshot.exists() else state
        beside = state if config.sampler.num_steps > every else 0
        needed |= {files.latents: latents, files.snapshot: first + max(0, beside - latents)}
    what = "the video and the work on it" if len(outputs) == 1 else f"{len(outputs)} videos and the work on one"
    check_space(needed, what=what)
