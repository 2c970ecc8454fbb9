"""Frames of a video file as RGB, by the file's own colour tags. Imports no torch."""

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from PIL import Image

from engine.errors import UserError
from engine.files.folders import is_frame

# Containers that are read. Playlists are not, since they name other files and addresses.
_OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi,mpegts,gif", "protocol_whitelist": "file"}

# FFmpeg's numbers (AVColorSpace, AVColorRange, AVColorTransferCharacteristic).
_UNSPECIFIED = 2
_BT709, _BT601 = 1, 5
_MATRICES = {
    1: 1,
    4: 4,
    5: 5,
    6: 5,
    7: 7,
    9: 9,
}  # to swscale's: BT.709, FCC, BT.601 (625 and 525 lines), SMPTE 240M, BT.2020
_OTHER_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "SMPTE 2085", 12: "chroma-derived", 14: "ICtCp"}
_LIMITED, _FULL = 1, 2
_HDR = {16: "PQ", 18: "HLG"}
# Untagged frames of more lines are read as BT.709, others as BT.601, as players do.
_MOST_LINES_OF_SD = 576


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[InputContainer]:
    """Open a video file for reading; av.FFmpegError or OSError if it is not one."""
    with av.open(str(path.absolute()), options=_OPTIONS) as container:
        yield container


def count_frames(path: Path) -> int:
    """Frames in a video file, from its packets; nothing is decoded."""
    with open_file(path) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def measure(path: Path) -> tuple[int, int, int] | None:
    """Frames, rows and columns of a video file or a folder of frames, without decoding; None for anything else."""
    try:
        if path.is_dir():
            frames = [file for file in path.iterdir() if is_frame(file)]
            with Image.open(frames[0]) as image:
                return len(frames), image.height, image.width
        if path.suffix == ".webp":  # FFmpeg reads only its first frame
            with Image.open(path) as image:
                return getattr(image, "n_frames", 1), image.height, image.width
        with open_file(path) as container:
            stream = container.streams.video[0]
            size = stream.height, stream.width
            return sum(1 for packet in container.demux(stream) if packet.size), *size
    except (av.FFmpegError, OSError, IndexError, ValueError, SyntaxError):
        return None


def frame_rate(path: Path) -> Fraction | None:
    """Frames per second of a video file, on average; None for a file that is no video or has no time."""
    try:
        with open_file(path) as container:
            return container.streams.video[0].average_rate
    except (av.FFmpegError, OSError, IndexError):
        return None


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Frames of a video file in order, uint8 [H, W, 3].

    YCbCr becomes RGB by the matrix and the range that the file is tagged with. Without a matrix, pictures of more than 576
    lines are BT.709 and others BT.601; without a range they are limited. Primaries are kept as they are.

    Raises:
        UserError: the file is no video, does not decode, changes its size, or has HDR or other colours that are not read.
    """
    count, size = 0, None
    try:
        with open_file(path) as container:
            for frame in container.decode(video=0):
                rgb = to_rgb(frame, path)
                if size not in (None, rgb.shape):
                    raise UserError(f"{path} changes its size after frame {count}, from {size[:2]} to {rgb.shape[:2]}")
                count, size = count + 1, rgb.shape
                yield rgb
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} does not decode after frame {count}: {error}") from error


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video file, uint8 [T, H, W, 3]; UserError as for `read_video`."""
    return np.stack(list(read_video(path)))


def check_colours(path: Path) -> None:
    """Raise UserError for colours that `read_video` does not read, by the first frame; av.FFmpegError if it does not decode."""
    with open_file(path) as container:
        for frame in container.decode(video=0):
            frame_colours(frame, path)
            return


def to_rgb(frame: av.VideoFrame, path: Path) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3]; UserError, which names the file, for colours that are not read."""
    matrix, full = frame_colours(frame, path)
    return frame.reformat(
        format="rgb24", src_colorspace=matrix, src_color_range=_FULL if full else _LIMITED
    ).to_ndarray()


def frame_colours(frame: av.VideoFrame, path: Path) -> tuple[int, bool]:
    """swscale's number of a frame's matrix, and whether its range is full; see `read_video`."""
    if frame.color_trc in _HDR:
        raise UserError(f"{path} is an HDR video ({_HDR[frame.color_trc]}); convert it to SDR first")
    name = frame.format.name
    is_full = frame.color_range == _FULL or (frame.color_range == 0 and name.startswith(("yuvj", "gray")))
    if frame.format.is_rgb or name.startswith(("gray", "pal8")):
        return _BT709, is_full  # nothing to convert by a matrix
    if frame.colorspace in _MATRICES:
        return _MATRICES[frame.colorspace], is_full
    if frame.colorspace in (0, _UNSPECIFIED):
        return _BT709 if frame.height > _MOST_LINES_OF_SD else _BT601, is_full
    named = _OTHER_MATRICES.get(frame.colorspace, f"number {frame.colorspace}")
    raise UserError(f"{path} has the colour matrix {named}, which is not read; convert it to BT.709 first")
