"""Proxies of files: once per file, the same on any number of processes, and again for other code."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.media.read_video import read_frames, read_video
from evaluation import measure
from evaluation.measure import measure_all, measure_file
from evaluation.videos import read_batch
from metrics.proxies import proxies


def test_any_number_of_processes_finds_the_same_and_it_is_kept(
    batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = read_batch(batch)[:3]
    said: list[str] = []
    alone = measure_all(videos, tmp_path / "a", workers=1, say=said.append)
    together = measure_all(videos, tmp_path / "b", workers=2, say=said.append)
    assert str(alone) == str(together)  # as text, because nan is not equal to itself
    assert alone.keys() == {video.path for video in videos}
    assert len({str(values) for values in alone.values()}) == 3
    monkeypatch.setattr(measure, "measure_file", lambda path, fps: pytest.fail("measured again"))
    assert str(measure_all(videos, tmp_path / "a", workers=1, say=said.append)) == str(alone)
    assert said == ["proxies: 3 of 3 videos to be measured"] * 2 + ["proxies: 0 of 3 videos to be measured"]


def test_other_code_measures_again(batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = read_batch(batch)[:1]
    measure_all(videos, tmp_path, workers=1, say=lambda line: None)
    monkeypatch.setattr(measure, "source_digest", lambda *_, **__: "another")
    said: list[str] = []
    measure_all(videos, tmp_path, workers=1, say=said.append)
    assert said == ["proxies: 1 of 1 videos to be measured"]


def test_a_file_is_decoded_as_the_engine_does(batch: Path) -> None:
    video = read_batch(batch)[0]
    frames = np.stack(list(read_video(video.path)))
    assert np.array_equal(read_frames(video.path), frames)
    assert str(measure_file(video.path, 4)) == str(proxies(frames, 4))


def test_rates_must_be_whole(batch: Path, tmp_path: Path) -> None:
    video = replace(read_batch(batch)[0], fps=Fraction(24000, 1001))
    with pytest.raises(UserError, match=r"23\.976 frames per second; proxies need a whole rate"):
        measure_all([video], tmp_path, workers=1, say=lambda line: None)
