"""Colours of files of other tools: by their own tags, against YCbCr that is made here from the standards' equations."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from engine.batch.make import check_video
from engine.errors import UserError
from engine.media.read_video import check_colours, count_frames, read_video

SIDE = 64
UNSPECIFIED = 2
LIMITED, FULL = 1, 2
# Luma coefficients (red, blue) by FFmpeg's number of the matrix.
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
COLOURS = {(0, 0): (210, 40, 30), (0, 1): (20, 180, 90), (1, 0): (30, 60, 220), (1, 1): (240, 230, 40)}


def picture(height: int = SIDE) -> np.ndarray:
    """Four flat fields, uint8 [H, W, 3]."""
    frame = np.zeros((height, SIDE, 3), np.uint8)
    for (row, column), colour in COLOURS.items():
        frame[row * height // 2 :, column * SIDE // 2 :] = colour
    return frame


def ycbcr(frame: np.ndarray, matrix: int, *, full: bool) -> np.ndarray:
    """Planes of yuv420p, [3H/2, W], by the equations of ITU-R BT.601, BT.709 and BT.2020."""
    red, blue = MATRICES[matrix]
    rgb = frame.astype(float) / 255
    luma = red * rgb[..., 0] + (1 - red - blue) * rgb[..., 1] + blue * rgb[..., 2]
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    scale, offset = (255, 0) if full else (219, 16)
    planes = [offset + scale * luma]
    planes += [128 + (255 if full else 224) * each[::2, ::2] for each in chroma]
    return np.concatenate([each.round().clip(0, 255).astype(np.uint8).ravel() for each in planes]).reshape(-1, SIDE)


def write(path: Path, planes: np.ndarray, *, matrix: int, color_range: int, transfer: int = UNSPECIFIED) -> Path:
    """A file of three frames with these tags, whatever its planes are."""
    with av.open(str(path), "w") as container:
        codec = "libvpx-vp9" if path.suffix == ".webm" else "libx264"
        stream = container.add_stream(codec, rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, len(planes) * 2 // 3, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range, context.color_trc = matrix, color_range, transfer
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        frame.colorspace, frame.color_range = matrix, color_range
        for _ in range(3):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def error(path: Path, expected: np.ndarray) -> int:
    """Largest error in the middle of the four fields, over all frames."""
    frames = list(read_video(path))
    assert len(frames) == count_frames(path) == 3
    height = len(expected)
    spots = [(y, x) for y in (height // 4, 3 * height // 4) for x in (SIDE // 4, 3 * SIDE // 4)]
    return max(int(np.abs(frame[y, x].astype(int) - expected[y, x]).max()) for frame in frames for y, x in spots)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_file_is_read_by_its_own_tags(tmp_path: Path, matrix: int, full: bool, ending: str) -> None:
    expected = picture()
    planes = ycbcr(expected, matrix, full=full)
    path = tmp_path / f"a.{ending}"
    assert error(write(path, planes, matrix=matrix, color_range=FULL if full else LIMITED), expected) <= 4
    # Negative control: the same planes with other tags are other colours.
    other = 5 if matrix in (1, 7, 9) else 1
    assert error(write(path, planes, matrix=other, color_range=FULL if full else LIMITED), expected) > 8
    assert error(write(path, planes, matrix=matrix, color_range=LIMITED if full else FULL), expected) > 8


@pytest.mark.parametrize(("height", "matrix"), [(480, 5), (576, 5), (720, 1), (1080, 1)])
def test_without_tags_the_height_decides(tmp_path: Path, height: int, matrix: int) -> None:
    expected = picture(height)
    path = write(tmp_path / "a.mp4", ycbcr(expected, matrix, full=False), matrix=UNSPECIFIED, color_range=0)
    assert error(path, expected) <= 4


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264rgb", "rgb24"), ("ffv1", "bgra"), ("gif", "rgb8")])
def test_rgb_has_no_matrix(tmp_path: Path, codec: str, pix_fmt: str) -> None:
    frame = (picture() > 128).astype(np.uint8) * 255  # colours that a palette of 256 has
    path = tmp_path / ("a.gif" if codec == "gif" else "a.mkv")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"crf": "0"} if codec == "libx264rgb" else {})
        stream.width = stream.height = SIDE
        stream.pix_fmt = pix_fmt
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)))
        container.mux(stream.encode())
    assert error(path, frame) <= 3  # a palette of 3 bits of red and green has 252 for 255


@pytest.mark.parametrize(
    ("matrix", "transfer", "message"),
    [
        (9, 16, r"a\.mp4 is an HDR video \(PQ\); convert it to SDR first"),
        (9, 18, r"a\.mp4 is an HDR video \(HLG\)"),
        (8, UNSPECIFIED, r"a\.mp4 has the colour matrix YCgCo, which is not read; convert it to BT\.709 first"),
        (14, UNSPECIFIED, "has the colour matrix ICtCp"),
    ],
)
def test_colours_that_are_not_read_are_refused(tmp_path: Path, matrix: int, transfer: int, message: str) -> None:
    path = write(
        tmp_path / "a.mp4", ycbcr(picture(), 9, full=False), matrix=matrix, color_range=LIMITED, transfer=transfer
    )
    with pytest.raises(UserError, match=message):
        check_colours(path)
    with pytest.raises(UserError, match=message):
        next(read_video(path))


@pytest.mark.parametrize("content", ["", "no video", "#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n"])
def test_invalid_video_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.mp4").write_text(content)
    write(tmp_path / "other.mp4", ycbcr(picture(), 1, full=False), matrix=1, color_range=LIMITED)
    with pytest.raises(UserError, match=r"a\.mp4 does not decode after frame 0: ") as caught:
        list(read_video(tmp_path / "a.mp4"))
    assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match=r"a\.mp4 does not decode after frame 0"):
        check_video(tmp_path / "a.mp4", num_frames=3, height=SIDE, width=SIDE)


def test_reading_needs_no_torch() -> None:
    code = "import sys, engine.media.read_video, evaluation.scoring.measures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
