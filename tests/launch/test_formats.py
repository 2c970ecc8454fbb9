"""Videos as mp4, GIF, WebP and folders of PNG frames, and what they say of themselves, made by every command that makes videos."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.files.claims import claim
from engine.files.whole import content_bytes, content_sha256
from engine.media.read_video import read_video
from engine.media.write_video import VideoWriter, as_comment
from engine.record import video_facts
from tests.engine.media.test_video import comments, content, read
from tests.launch.conftest import SMALL, Run
from tests.launch.test_generate import names

Make = Callable[..., Run]
OTHERS = ("v.gif", "v.webp", "v/")


@pytest.mark.parametrize("name", OTHERS)
def test_each_kind_is_made_decoded_and_found_finished(make: Make, run: Make, tmp_path: Path, name: str) -> None:
    path, kept = tmp_path / name, tmp_path / "kept.safetensors"
    given = {"output.path": f"{tmp_path}/{name}", "output.save_latents": kept}
    assert make(given).code == 0
    record = json.loads((tmp_path / "v.json").read_text())
    assert record["video"]["sha256"] == content_sha256(path)
    assert record["video"]["bytes"] == content_bytes(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "v.json", "v.png", "kept.safetensors"}
    assert set(comments(path)) == {as_comment(video_facts(record))}
    assert len(read(path)) == 17
    # The frames are those of the mp4, but for what either loses.
    assert make().code == 0
    mp4 = np.stack(list(read_video(tmp_path / "a.mp4"))).astype(int)
    assert np.abs(read(path) - mp4).mean() < 12
    assert np.abs(read(path)[::-1] - mp4).mean() > np.abs(read(path) - mp4).mean()

    assert "finished already, 17 frames" in make(given).out
    assert run("decode", kept, "--output", f"{tmp_path}/decoded{name[1:]}").code == 0
    assert content(tmp_path / f"decoded{name[1:]}") == [
        (each.replace("v.", "decoded."), data) for each, data in content(path)
    ]
    # Stopped between video and record, the same command continues, and takes the video that is there for its own.
    before = content(path)
    (tmp_path / "v.json").unlink()
    assert make(given).code == 0
    assert content(path) == before
    # Something else of this name is not replaced, unless asked for.
    (sorted(path.iterdir())[0] if path.is_dir() else path).write_bytes(b"other")
    assert "another file by now" in make(given).error
    assert make(given | {"output.overwrite": "true"}).code == 0
    assert content(path) == before


@pytest.mark.parametrize("name", ["v.mp4", *OTHERS])
def test_without_metadata_a_video_says_nothing(make: Make, run: Make, tmp_path: Path, name: str) -> None:
    path, kept = tmp_path / name, tmp_path / "kept.safetensors"
    given = {"output.path": f"{tmp_path}/{name}", "output.metadata": "false", "output.save_latents": kept}
    assert make(given).code == 0
    assert set(comments(path)) == {None}
    assert b"a red circle" not in b"".join(data for _, data in content(path))
    assert "output.metadata was False, now True" in make(given | {"output.metadata": "true"}).error
    # decode.py does as the run did, unless told otherwise.
    for words, told in (((), False), (("--metadata", "true"), True)):
        out = f"{tmp_path}/{told}{name[1:]}"
        assert run("decode", kept, "--output", out, *words).code == 0
        assert (None not in comments(Path(out))) == told


def test_two_prompts_are_two_folders(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    assert make({"output.path": f"{tmp_path}/v/"}, "--prompts", tmp_path / "prompts.txt").code == 0
    assert len(names(tmp_path / "v-000")) == len(names(tmp_path / "v-001")) == 17
    for index, prompt in enumerate(("a red circle", "a blue star")):
        assert json.loads(str(comments(tmp_path / f"v-00{index}")[-1]))["prompt"] == prompt


def test_folders_that_may_not_be_taken(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))
    given = {"output.path": f"{tmp_path}/v/"}
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "000000.png").touch()
    assert f"{tmp_path}/v exists already" in make(given).error
    (tmp_path / "v" / "family.png").touch()
    assert "holds family.png, which is not a frame of a video" in make(given | {"output.overwrite": "true"}).error
    assert names(tmp_path) == {"000000.png", "family.png"}
    (tmp_path / "w").touch()
    assert f"{tmp_path}/w is a file" in make({"output.path": f"{tmp_path}/w/"}).error
    with claim([tmp_path / "u"], advice="wait"):
        assert f"{tmp_path}/u is being made by" in make({"output.path": f"{tmp_path}/u/"}).error


def test_a_record_has_one_video(make: Make, tmp_path: Path) -> None:
    assert make().code == 0
    error = make({"output.path": tmp_path / "a.gif"}).error
    assert error.startswith(f"{tmp_path / 'a.json'} is the record of a.mp4; choose another name")


def test_a_full_disk_leaves_no_folder_and_says_how_to_go_on(make: Make, run: Make, tmp_path: Path) -> None:
    write = VideoWriter.write

    def fill_disk(self: VideoWriter, frames: np.ndarray) -> None:
        write(self, frames)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", fill_disk)
        error = make({"output.path": f"{tmp_path}/v/"}).error
    assert error.startswith(f"cannot write {tmp_path}/v: No space left on device; the latents are kept in")
    assert error.endswith(f"--output {tmp_path}/v/")
    assert names(tmp_path) == {"v.latents.safetensors"}
    assert make({"output.path": f"{tmp_path}/v/"}).code == 0
    assert len(names(tmp_path / "v")) == 17


def test_the_demo_s_videos_say_what_they_are(run: Make, wan_folder: Path, tmp_path: Path) -> None:
    settings = SMALL | {"model.path": wan_folder, "folder": tmp_path / "demo", "sampler.max_text_tokens": 64}
    assert run("demo", *(f"--{key}={value}" for key, value in settings.items())).code == 0
    for name in ("direct", "sliding_window", "freespec"):
        assert json.loads(str(comments(tmp_path / "demo" / f"{name}.mp4")[0]))["method"]["name"] == name
