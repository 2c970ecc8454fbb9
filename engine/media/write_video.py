"""Write frames to a video as they arrive: mp4, GIF, WebP or a folder of PNG files, under a temporary name until complete."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import ExifTags, Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from engine.config import MOST_FPS, MOST_RATES, VIDEO_KINDS, VideoKind
from engine.errors import UserError
from engine.files.folders import frame_name
from engine.files.whole import atomic_path
from engine.media.read_video import count_frames

# ITU-R BT.709 in ffmpeg's numbering of matrix, primaries and transfer, and of limited range. Tagged in the file, since players
# guess by the frame's size otherwise, and colours would shift.
_BT709 = 1
_LIMITED_RANGE = 1


class VideoWriter:
    """Base class of the writers that `open_video` returns, one for each kind of video."""

    num_frames = 0

    def write(self, frames: np.ndarray) -> None:
        """Append frames, uint8 [t, H, W, 3]."""
        for frame in frames:
            self._add(np.ascontiguousarray(frame))
            self.num_frames += 1

    def finish(self) -> None:
        """Flush the encoder, and write the metadata."""

    def count(self) -> int:
        """Frames in the finished file."""
        raise NotImplementedError

    def _add(self, frame: np.ndarray) -> None:
        raise NotImplementedError


@contextlib.contextmanager
def open_video(
    path: Path,
    *,
    kind: VideoKind = "mp4",
    fps: int,
    height: int,
    width: int,
    crf: int,
    facts: Mapping[str, Any] | None = None,
    replace: bool = True,
) -> Iterator[VideoWriter]:
    """Open a writer of the video `path`, which appears only if the block succeeds.

    The same arguments and frames give the same bytes.

    Args:
        path: the file, or the folder of `png`.
        kind: format, regardless of the path's suffix.
        fps: frames per second; a folder has none.
        height: pixels.
        width: pixels.
        crf: quality of mp4 and WebP, 0 (lossless; mp4 keeps colours at half the resolution) to 51; GIF and PNG have none.
        facts: metadata (`engine.record.video_facts`), as JSON in the file's comment; None writes none.
        replace: whether an existing video is replaced, see `engine.files.whole.publish`.

    Raises:
        WriteError: the file cannot be written, does not hold every frame, or, without `replace`, another file has the name.
    """
    with atomic_path(path, replace=replace) as part, contextlib.ExitStack() as stack:
        target = _Target(part=part, fps=fps, size=(height, width), crf=crf, facts=facts)
        writer: VideoWriter = _Frames(target) if kind == "png" else _STREAMS[kind](target, stack)
        yield writer
        writer.finish()
        found = writer.count()
        if found != writer.num_frames:
            raise OSError(f"it holds {found} of {writer.num_frames} frames after writing")


def write_video(path: str | Path, frames: np.ndarray, *, fps: int, crf: int = 12, replace: bool = True) -> None:
    """Write frames, uint8 [T, H, W, 3], to .mp4, .gif, .webp or a new folder of PNG files, atomically; see `open_video`."""
    path = Path(path)
    if path.suffix not in VIDEO_KINDS or not path.name:
        raise UserError(f"a video must end in .mp4, .gif or .webp, or be the name of a folder, got {path}")
    _check_frames(path, frames, fps)
    _, height, width, _ = frames.shape
    kind = VIDEO_KINDS[path.suffix]
    with open_video(path, kind=kind, fps=fps, height=height, width=width, crf=crf, replace=replace) as video:
        video.write(frames)


def _check_frames(path: Path, frames: np.ndarray, fps: int) -> None:
    """Raise UserError for frames or a rate that the format cannot hold."""
    kind, shape = getattr(frames, "dtype", type(frames).__name__), list(getattr(frames, "shape", []))
    if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"{path}: frames must be a NumPy array, uint8 [T, H, W, 3] with T >= 1, got {kind} {shape}")
    if path.suffix == ".mp4" and (shape[1] % 2 or shape[2] % 2):
        raise UserError(f"{path}: frames of an mp4 must have even sizes, got {shape[1]} x {shape[2]}; crop them")
    most = MOST_RATES.get(path.suffix, MOST_FPS)
    if type(fps) is not int or not 1 <= fps <= most:
        raise UserError(f"{path}: fps must be a whole number from 1 to {most}, got {fps!r:.60}")


def as_comment(facts: Mapping[str, Any]) -> str:
    """Facts as one line of JSON in ASCII, which every format's comment takes."""
    return json.dumps(facts, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What `open_video` was asked for; `part` is the temporary name."""

    part: Path
    fps: int
    size: tuple[int, int]
    crf: int
    facts: Mapping[str, Any] | None


class _Stream(VideoWriter):
    """A container that PyAV writes, with one stream of pictures."""

    def __init__(
        self,
        target: _Target,
        stack: contextlib.ExitStack,
        *,
        container: str,
        codec: str,
        pixels: str,
        options: tuple[dict[str, str], dict[str, str]],
    ) -> None:
        """`options` of the container and of the codec; `stack` closes the container if `finish` does not."""
        self.target = target
        self.time_base = Fraction(1, target.fps)
        self.container = av.open(str(target.part), "w", format=container, options=options[0])
        stack.callback(self.container.close)
        stream = self.container.add_stream(codec, rate=target.fps, options=options[1])
        assert isinstance(stream, av.VideoStream)
        self.stream = stream
        self.stream.height, self.stream.width = target.size
        self.stream.pix_fmt = pixels

    def _add(self, frame: np.ndarray) -> None:
        rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
        rgb.pts, rgb.time_base = self.num_frames, self.time_base
        self.encode(rgb)

    def encode(self, rgb: av.VideoFrame) -> None:
        """Encode a frame in RGB, whose time is set."""
        raise NotImplementedError

    def finish(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()

    def count(self) -> int:
        return count_frames(self.target.part)


class _Mp4(_Stream):
    """H.264."""

    def __init__(self, target: _Target, stack: contextlib.ExitStack) -> None:
        # For equal bytes from equal frames: one thread, and cpu-independent, as some of x264's vector code reads uninitialised
        # memory. Encoding is never the bottleneck of a run.
        codec = {"crf": str(target.crf), "preset": "medium", "threads": "1", "x264-params": "cpu-independent=1"}
        # faststart: the index comes first, so that a browser plays the file while it loads.
        options = ({"movflags": "faststart"}, codec)
        super().__init__(target, stack, container="mp4", codec="libx264", pixels="yuv420p", options=options)
        context = self.stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        if (facts := target.facts) is not None:
            self.container.metadata["comment"] = as_comment(facts)
            # Shown by players and in terminals, so without control characters and surrogates.
            title = (letter if letter.isprintable() else " " for letter in str(facts["prompt"]))
            self.container.metadata["title"] = "".join(title)

    def encode(self, rgb: av.VideoFrame) -> None:
        yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        self.container.mux(self.stream.encode(yuv))


class _Gif(_Stream):
    """A looping GIF with a palette for each frame, so that it is written as frames arrive."""

    def __init__(self, target: _Target, stack: contextlib.ExitStack) -> None:
        super().__init__(target, stack, container="gif", codec="gif", pixels="pal8", options=({"loop": "0"}, {}))
        height, width = target.size
        self.graph = graph = av.filter.Graph()  # kept, as its filters live only as long as it does
        self.source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=self.time_base)  # type: ignore[arg-type]
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
        # An ordered dither is stable over time; error diffusion would flicker.
        paint = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5")
        self.painted = graph.add("buffersink")
        self.source.link_to(split)
        split.link_to(palette, 0)
        split.link_to(paint, 1, 0)
        palette.link_to(paint, 0, 1)
        paint.link_to(self.painted)
        graph.configure()

    def encode(self, rgb: av.VideoFrame | None) -> None:
        self.source.push(rgb)
        with contextlib.suppress(BlockingIOError, EOFError):
            while True:
                painted = self.painted.pull()
                assert isinstance(painted, av.VideoFrame)
                self.container.mux(self.stream.encode(painted))

    def finish(self) -> None:
        self.encode(None)
        super().finish()
        if self.target.facts is not None:
            _insert_gif_comment(self.target.part, as_comment(self.target.facts).encode("ascii"))


def _insert_gif_comment(path: Path, text: bytes) -> None:
    """Insert a comment extension before the first frame of a GIF, where readers look for it."""
    blocks = [text[start : start + 255] for start in range(0, len(text), 255)]
    extension = b"\x21\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    with path.open("r+b") as file, tempfile.TemporaryFile(dir=path.parent) as rest:
        flags = file.read(11)[10]
        after_palette = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        file.seek(after_palette)
        shutil.copyfileobj(file, rest)
        rest.seek(0)
        file.seek(after_palette)
        file.write(extension)
        shutil.copyfileobj(rest, file)


class _WebP(_Stream):
    """A looping animated WebP. Frames equal to the one before are stored as a longer duration of that."""

    def __init__(self, target: _Target, stack: contextlib.ExitStack) -> None:
        # libwebp counts quality upwards, from 0 to 100.
        codec = {"lossless": "1"} if target.crf == 0 else {"quality": str(round(100 - 100 * target.crf / 51))}
        options = ({"loop": "0"}, codec)
        super().__init__(target, stack, container="webp", codec="libwebp_anim", pixels="bgra", options=options)

    def encode(self, rgb: av.VideoFrame) -> None:
        self.container.mux(self.stream.encode(rgb.reformat(format="bgra")))

    def finish(self) -> None:
        super().finish()
        if self.target.facts is not None:
            _add_webp_description(self.target.part, as_comment(self.target.facts), self.target.size)

    def count(self) -> int:
        """Count frames by their duration in whole milliseconds; libwebp writes a still image for a video without changes."""
        shown = 0
        with Image.open(self.target.part) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()  # which sets the duration
                shown += frame.info.get("duration", 0)
            if getattr(image, "n_frames", 1) == 1:
                return self.num_frames
        expected = self.num_frames * 1000 * self.time_base
        return self.num_frames if abs(shown - expected) <= 1 else round(shown / 1000 / self.time_base)


def _add_webp_description(path: Path, text: str, size: tuple[int, int]) -> None:
    """Add the EXIF field ImageDescription to a WebP file."""
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    payload = exif.tobytes().removeprefix(b"Exif\0\0")
    with path.open("r+b") as file:
        file.seek(12)
        if file.read(4) != b"VP8X":  # a still image: further chunks need this header
            file.seek(12)
            chunks = file.read()
            height, width = size
            header = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
            file.seek(12)
            file.write(b"VP8X" + len(header).to_bytes(4, "little") + header + chunks)
        file.seek(20)
        flags = file.read(1)[0]
        file.seek(20)
        file.write(bytes([flags | 0x08]))  # there is an EXIF chunk
        file.seek(0, 2)
        file.write(b"EXIF" + len(payload).to_bytes(4, "little") + payload + bytes(len(payload) % 2))
        total = file.tell()
        file.seek(4)
        file.write((total - 8).to_bytes(4, "little"))


class _Frames(VideoWriter):
    """A folder of PNG files, 000000.png and so on."""

    def __init__(self, target: _Target) -> None:
        self.folder = target.part
        self.info = PngInfo()
        if target.facts is not None:
            self.info.add_text("Comment", as_comment(target.facts))
        self.folder.mkdir()

    def _add(self, frame: np.ndarray) -> None:
        Image.fromarray(frame).save(self.folder / frame_name(self.num_frames), format="png", pnginfo=self.info)

    def count(self) -> int:
        return sum(1 for _ in self.folder.iterdir())


_STREAMS: dict[str, Callable[[_Target, contextlib.ExitStack], _Stream]] = {"mp4": _Mp4, "gif": _Gif, "webp": _WebP}
