"""Video files: whole or absent, every frame in them, colours kept, the same bytes for the same frames."""

import contextlib
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageSequence

from engine.config import VideoKind
from engine.errors import UserError
from engine.files.whole import WriteError
from engine.media.read_video import count_frames, read_video
from engine.media.write_video import as_comment, open_video, write_video


def moving_bars(num_frames: int, *, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames uint8 [T, H, W, 3]: a red upper half, a blue lower one, and a white bar that moves."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[:, : height // 2] = (210, 40, 30)
    frames[:, height // 2 :] = (30, 60, 220)
    for i in range(num_frames):
        frames[i, :, i % (width - 8) : i % (width - 8) + 4] = 250
    return frames


KINDS: dict[str, VideoKind] = {".mp4": "mp4", ".gif": "gif", ".webp": "webp", "": "png"}
NAMES = ("a.mp4", "a.gif", "a.webp", "a")
FACTS = {
    "prompt": "a red\x1b circle \u7ea2\u2028 \udcff!",
    "seed": 3,
    "settings": {"sampler": {"num_steps": 2}, "long": "x" * 600},
}


def write(path: Path, frames: np.ndarray, *, crf: int = 12, pieces: int = 3, **given: Any) -> None:
    """Write frames [T, H, W, 3] in pieces, as the path's ending says."""
    size = {"height": frames.shape[1], "width": frames.shape[2]}
    with open_video(path, kind=KINDS[path.suffix], fps=16, crf=crf, **size, **given) as video:
        for piece in np.array_split(frames, pieces):
            video.write(piece)


def read(path: Path) -> np.ndarray:
    """Frames [T, H, W, 3] of a video of any kind, by PIL where PyAV does not read it."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file)) for file in sorted(path.iterdir())])
    if path.suffix == ".webp":
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    return np.stack(list(read_video(path)))


def content(path: Path) -> list[tuple[str, bytes]]:
    """Names and bytes of a file, or of the files in a folder."""
    return [(each.name, each.read_bytes()) for each in (sorted(path.iterdir()) if path.is_dir() else [path])]


def comments(path: Path) -> list[str | None]:
    """What a video says of itself, as its users' tools read it; of a folder each frame's."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [container.metadata.get("comment")]
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with Image.open(file) as image:
            comment = image.info.get("comment", b"").decode() or image.info.get("Comment")
            found.append(comment or image.getexif().get(ExifTags.Base.ImageDescription))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_kind_holds_every_frame_and_its_time(tmp_path: Path, name: str) -> None:
    frames, path = moving_bars(29), tmp_path / name
    write(path, frames, crf=0, facts=FACTS)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    found = read(path)
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).mean() < {".gif": 1, ".mp4": 4}.get(path.suffix, 0.5)
    assert np.abs(found.astype(int) - frames[::-1]).mean() > 8  # negative control
    if path.suffix in (".gif", ".webp"):
        shown = 0
        with Image.open(path) as image:
            assert image.info["loop"] == 0  # for ever
            for frame in ImageSequence.Iterator(image):
                frame.load()
                shown += frame.info["duration"]
        assert abs(shown - 1000 * 29 / 16) <= 10


@pytest.mark.parametrize("num_frames", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_short_videos_and_pictures_that_stand_still(tmp_path: Path, name: str, num_frames: int) -> None:
    still = np.repeat(moving_bars(1), num_frames, axis=0)
    write(tmp_path / name, still, facts=FACTS)
    assert np.abs(read(tmp_path / name)[-1].astype(int) - still[-1]).mean() < 8
    assert comments(tmp_path / name)[0] == as_comment(FACTS)


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_read_back_and_only_where_they_were_given(tmp_path: Path, name: str) -> None:
    told, silent = tmp_path / "told" / name, tmp_path / "silent" / name
    for path, given in ((told, {"facts": FACTS}), (silent, {})):
        path.parent.mkdir()
        write(path, moving_bars(5), **given)
    assert set(comments(told)) == {as_comment(FACTS)}
    assert json.loads(as_comment(FACTS)) == FACTS
    assert set(comments(silent)) == {None}
    assert b"circle" not in b"".join(data for _, data in content(silent))
    np.testing.assert_array_equal(read(told), read(silent))
    if told.suffix == ".mp4":
        with av.open(str(told)) as container:
            assert container.metadata["title"] == "a red  circle \u7ea2   !"


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_same_frames_and_facts_give_the_same_bytes_in_each_kind(tmp_path: Path, name: str) -> None:
    for folder, given in (("a", {"pieces": 1}), ("b", {"pieces": 7}), ("c", {"facts": FACTS | {"seed": 4}})):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, moving_bars(20), **({"facts": FACTS} | given))
    first, second, other = (content(tmp_path / folder / name) for folder in "abc")
    assert first == second
    assert first != other


def test_webp_is_lossless_at_crf_0_and_smaller_above(tmp_path: Path) -> None:
    sizes = []
    for crf in (0, 12, 40):
        write(tmp_path / f"{crf}.webp", moving_bars(9), crf=crf)
        sizes.append((tmp_path / f"{crf}.webp").stat().st_size)
    np.testing.assert_array_equal(read(tmp_path / "0.webp"), moving_bars(9))
    assert sizes[1] > sizes[2]


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_format_is_written_atomically(tmp_path: Path, name: str) -> None:
    def fail() -> None:
        with open_video(tmp_path / name, kind=KINDS[Path(name).suffix], fps=16, height=32, width=48, crf=12) as video:
            video.write(moving_bars(9))
            assert not (tmp_path / name).exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a"])
def test_truncated_video_of_any_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The writer believes that it was given a frame more than it encoded."""
    with (
        pytest.raises(WriteError, match="holds 9 of 10 frames"),
        open_video(tmp_path / name, kind=KINDS[Path(name).suffix], fps=16, height=32, width=48, crf=12) as video,
    ):
        video.write(moving_bars(9))
        video.num_frames += 1
    assert list(tmp_path.iterdir()) == []


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


def test_truncated_video_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.media.write_video.count_frames", lambda path: 8)
    with pytest.raises(OSError, match="holds 8 of 9 frames"):
        write(tmp_path / "a.mp4", moving_bars(9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "frames", "fps", "told"),
    [
        ("a.mp4", moving_bars(2).astype(np.float32), 16, r"uint8 \[T, H, W, 3\] with T >= 1, got float32"),
        ("a.mp4", moving_bars(2)[:0], 16, r"got uint8 \[0, 32, 48, 3\]"),
        ("a.gif", moving_bars(2)[0], 16, r"got uint8 \[32, 48, 3\]"),
        ("a.mp4", list(moving_bars(2)), 16, r"got list \[\]"),
        ("a.mp4", moving_bars(2)[:, :31], 16, "even sizes, got 31 x 48; crop them"),
        ("a.mp4", moving_bars(2), 0, "fps must be a whole number from 1 to 1000, got 0"),
        ("a.gif", moving_bars(2), 60, "from 1 to 50, got 60"),
        ("a.webp", moving_bars(2), 16.5, r"from 1 to 90, got 16\.5"),
        ("", moving_bars(2), 16, "or be the name of a folder"),
    ],
)
def test_frames_that_no_video_holds_are_refused_and_leave_nothing(
    tmp_path: Path, name: str, frames: Any, fps: Any, told: str
) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match=told):
        write_video(name, frames, fps=fps)
    assert list(tmp_path.iterdir()) == []
    write_video(tmp_path / "odd.gif", moving_bars(2)[:, :31], fps=16)  # only mp4 halves the colours
