"""Video files: whole or absent, every frame in them, colours kept, the same bytes for the same frames."""

import errno
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest

from engine.read_video import count_frames, read_video
from engine.video import open_video


def moving_bars(num_frames: int, *, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames uint8 [T, H, W, 3]: a red upper half, a blue lower one, and a white bar that moves."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:, : height // 2] = (210, 40, 30)
    frames[:, height // 2 :] = (30, 60, 220)
    for i in range(num_frames):
        frames[i, :, i % (width - 8) : i % (width - 8) + 4] = 250
    return frames


def write(path: Path, frames: np.ndarray, *, crf: int = 12, pieces: int = 3) -> None:
    """Write frames [T, H, W, 3] in pieces."""
    with open_video(path, fps=16, height=frames.shape[1], width=frames.shape[2], crf=crf) as video:
        for piece in np.array_split(frames, pieces):
            video.write(piece)


def test_every_frame_is_in_the_file_with_its_colours_and_its_rate(tmp_path: Path) -> None:
    frames = moving_bars(29)
    write(tmp_path / "a.mp4", frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert count_frames(tmp_path / "a.mp4") == 29
    found = np.stack(list(read_video(tmp_path / "a.mp4")))
    assert found.shape == frames.shape
    # Chroma has half the resolution, so the bar's edges differ; flat colour does not.
    for region in (np.s_[:, 2:14, -4:], np.s_[:, -12:-2, -4:]):
        assert np.abs(found[region].astype(int) - frames[region]).max() <= 8
    assert np.abs(found.astype(int) - frames).mean() < 4
    # Negative control: the same frames in another order are far away.
    assert np.abs(found.astype(int) - frames[::-1]).mean() > 8
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"


def test_a_player_that_reads_the_tags_sees_the_same_colours(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving_bars(5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = moving_bars(20)
    write(tmp_path / "a.mp4", frames, pieces=1)
    write(tmp_path / "b.mp4", frames, pieces=7)
    write(tmp_path / "c.mp4", frames, crf=30)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert len((tmp_path / "c.mp4").read_bytes()) < len((tmp_path / "a.mp4").read_bytes())


def test_the_index_comes_before_the_frames(tmp_path: Path) -> None:
    """So that a browser starts to play before it has the whole file."""
    write(tmp_path / "a.mp4", moving_bars(5))
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError("x")]
)
def test_a_video_that_fails_midway_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with open_video(tmp_path / "a.mp4", fps=16, height=32, width=48, crf=12) as video:
            video.write(moving_bars(90))
            (part,) = tmp_path.iterdir()
            assert re.fullmatch(rf"a\.mp4\.{os.getpid()}-[0-9a-f]{{8}}-[0-9a-f]{{6}}\.part", part.name)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_video_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving_bars(5))
    before = (tmp_path / "a.mp4").read_bytes()

    def fail() -> None:
        with open_video(tmp_path / "a.mp4", fps=16, height=32, width=48, crf=12):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_video_that_lost_frames_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.video.count_frames", lambda path: 8)
    with pytest.raises(OSError, match="holds 8 of 9 frames"):
        write(tmp_path / "a.mp4", moving_bars(9))
    assert list(tmp_path.iterdir()) == []
