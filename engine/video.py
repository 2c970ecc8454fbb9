"""Frames to an mp4 file, as they come: H.264 under a temporary name, renamed when it is whole."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from engine.files.whole import atomic_path
from engine.read_video import count_frames

# ITU-R BT.709 in ffmpeg's numbering of matrix, primaries and transfer, and of limited range. Written into the file:
# players guess otherwise, by the picture's size, and colours would shift.
_BT709 = 1
_LIMITED_RANGE = 1


class VideoWriter:
    """An H.264 stream that takes frames; made by `open_video`."""

    def __init__(self, container: av.container.OutputContainer, *, fps: int, height: int, width: int, crf: int) -> None:
        # The same frames give the same bytes: with more threads, or without cpu-independent (some of x264's vector code
        # reads memory that was never written), they would not. The encoder is never what a run waits for.
        options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        self._container = container
        self._stream = stream
        self.num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [t, H, W, 3]."""
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            self._container.mux(self._stream.encode(yuv))
            self.num_frames += 1

    def finish(self) -> None:
        """Encode what the encoder still holds back."""
        self._container.mux(self._stream.encode())


@contextlib.contextmanager
def open_video(
    path: Path, *, fps: int, height: int, width: int, crf: int, replace: bool = True
) -> Iterator[VideoWriter]:
    """A writer of the mp4 `path`, which exists once the block has ended well, and not at all if it fails.

    Raises WriteError if the file cannot be written, does not hold every frame that was given, or, without `replace`, if
    another file has the name.
    """
    with atomic_path(path, replace=replace) as part:
        # faststart: the index comes first, so that a browser plays the file while it loads.
        with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
            writer = VideoWriter(container, fps=fps, height=height, width=width, crf=crf)
            yield writer
            writer.finish()
        found = count_frames(part)
        if found != writer.num_frames:
            raise OSError(f"it holds {found} of {writer.num_frames} frames after writing")
