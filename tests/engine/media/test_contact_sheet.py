"""Contact sheets and comparisons: the right frames, sharp when small, in bounds when large."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.media.contact_sheet import FrameSampler, Row, comparison, contact_sheet, spaced, write_picture


def numbered(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] whose every value is the frame's number."""
    return np.broadcast_to(np.arange(num_frames, dtype=np.uint8)[:, None, None, None], (num_frames, height, width, 3))


def test_spaced_has_both_ends_and_even_steps() -> None:
    assert spaced(129, 5) == [0, 32, 64, 96, 128]
    assert spaced(3, 12) == [0, 1, 2]
    assert spaced(9, 1) == [4]
    steps = np.diff(spaced(129, 12))
    assert set(steps.tolist()) == {11, 12}


@pytest.mark.parametrize("pieces", [1, 4, 33])
def test_the_sampler_keeps_the_same_frames_however_they_come(pieces: int) -> None:
    frames = numbered(33)
    sampler = FrameSampler(total=33, count=5)
    for piece in np.array_split(frames, pieces):
        sampler.add(piece)
    assert [int(frame[0, 0, 0]) for frame in sampler.frames] == sampler.indices == [0, 8, 16, 24, 32]


def test_the_sampler_does_not_hold_on_to_the_pieces() -> None:
    piece = np.zeros((33, 64, 64, 3), np.uint8)
    sampler = FrameSampler(total=33, count=3)
    sampler.add(piece)
    assert all(frame.base is None for frame in sampler.frames)


def test_small_frames_are_enlarged_by_a_whole_number() -> None:
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:, ::2] = 255
    sheet = np.asarray(contact_sheet([frame] * 4, [0.0, 0.5, 1.0, 1.5]))
    corner = sheet[24 : 24 + 128, 24 : 24 + 128]
    assert np.array_equal(corner[::2, ::2], frame)
    assert np.array_equal(corner[1::2, 1::2], frame)


@pytest.mark.parametrize(("height", "width", "count"), [(64, 64, 12), (480, 832, 12), (832, 480, 7), (16, 16, 1)])
def test_a_sheet_of_any_video_has_a_sensible_size(height: int, width: int, count: int) -> None:
    sheet = contact_sheet(list(numbered(count, height, width)), [i / 16 for i in range(count)])
    assert 128 <= sheet.width <= 2400
    assert 128 <= sheet.height <= 2400


def test_a_comparison_has_each_frame_in_its_row_and_column() -> None:
    times = [0.0, 1.0, 2.0]
    rows = [
        Row(name=name, note="2 s", frames=[np.full((64, 64, 3), 10 * (i + 1) + j, np.uint8) for j in range(3)])
        for i, name in enumerate(("direct", "freespec"))
    ]
    picture = comparison(rows, times, title="a red circle", subtitle="33 frames", width=700)
    pixels = np.asarray(picture)
    assert abs(picture.width - 700) <= 3 * 64
    where = {}
    for value in (10, 11, 12, 20, 21, 22):
        # Flat patches only: letters have such greys too.
        ys, xs = np.nonzero((pixels == value).all(axis=-1))
        where[value] = (np.median(ys), np.median(xs))
    assert where[10][0] == where[12][0] < where[20][0] == where[22][0]
    assert where[10][1] == where[20][1] < where[11][1] < where[12][1]


def test_picture_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = contact_sheet(list(numbered(2)), [0.0, 1.0])
    write_picture(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(picture))

    def fill_disk(self: Image.Image, path: Path, **settings: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_disk)
    with pytest.raises(OSError, match="No space"):
        write_picture(tmp_path / "b.png", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
