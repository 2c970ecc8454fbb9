"""generate.py with timelines and given frames, from the command line to the files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.media.read_video import count_frames
from launch.commands import generate
from tests.launch.conftest import SMALL, Run

Make = Callable[..., Run]
TWO = "a red circle [0-0.5s] | a gold star [0.5s-, cut]"
FILE = """
common: on a table
events:
  - {text: a red circle, stop: 8, negative: blurred}
  - {text: a gold star, start: 8, transition: fade, width: 4, negative: dark}
"""


@pytest.fixture
def make(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> Make:
    """`make({setting: value})`: generate.py on the small checkpoint, without a prompt if something else says what is shown."""

    def call(settings: dict[str, object] | None = None) -> Run:
        chosen = {"model.path": wan_folder, "output.path": tmp_path / "a.mp4"} | SMALL | (settings or {})
        if not chosen.keys() & {"prompt", "timeline", "prompts"}:
            chosen["prompt"] = "a red circle"
        several = {key: value if isinstance(value, list) else [value] for key, value in chosen.items()}
        return run("generate", *(f"--{key}={value}" for key, values in several.items() for value in values))

    return call


def record_of(folder: Path) -> dict:
    return json.loads((folder / "a.json").read_text())


def test_a_timeline_is_in_the_record_and_under_the_frames(make: Make, tmp_path: Path) -> None:
    shown = make({"timeline": TWO})
    assert (shown.code, shown.err) == (0, "")
    record = record_of(tmp_path)
    assert record["prompt"] == "a red circle [0s-0.5s] | a gold star [0.5s-, cut]"
    assert [(event["text"], event["start"], event["stop"]) for event in record["timeline"]] == [
        ("a red circle", 0, 9),
        ("a gold star", 9, 17),
    ]
    with Image.open(tmp_path / "a.png") as sheet:
        timed = sheet.size
    assert make({"timeline": TWO}).out.startswith(f"{tmp_path / 'a.mp4'}: finished already")
    assert "video.fps was 16, now 8" in make({"timeline": TWO, "video.fps": 8}).error
    assert make({"output.path": tmp_path / "b.mp4"}).code == 0
    with Image.open(tmp_path / "b.png") as sheet:
        assert sheet.height < timed[1]  # a line of captions less
    assert json.loads((tmp_path / "b.json").read_text())["timeline"] is None


def test_a_timeline_in_a_file_has_negative_texts(make: Make, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(FILE)
    assert make({"timeline": tmp_path / "story.yaml"}).code == 0
    record = record_of(tmp_path)
    assert [event["text"] for event in record["timeline"]] == ["a red circle, on a table", "a gold star, on a table"]
    assert [event["negative_text"] for event in record["timeline"]] == ["blurred", "dark"]
    both = {"timeline": tmp_path / "story.yaml", "sampler.negative_prompt": "bad", "output.path": tmp_path / "b.mp4"}
    assert make(both).error.startswith(
        "the events of --timeline have negative texts; leave out --sampler.negative_prompt"
    )


def test_lines_of_a_prompt_file_may_be_timelines(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{TWO}\n")
    assert make({"prompts": tmp_path / "prompts.txt"}).code == 0
    kept = [json.loads(path.read_text())["timeline"] for path in sorted(tmp_path.glob("*.json"))]
    assert [events is None for events in kept] == [True, False]
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{TWO.replace('0.5s', '8s')}\n")
    error = make({"prompts": tmp_path / "prompts.txt", "output.path": tmp_path / "b.mp4"}).error
    assert error.startswith("line 2 of prompts.txt: event 1 of the timeline, 'a red circle' [0s-8s], exceeds the video")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("a red circle", "has no range"),
        ("a [0-4] | b", "has no range"),
        ("a [0-4s] | b [8-]", "mixes seconds and frames"),
        ("a [0-4] | b [8-]", "nothing covers 4 to 8"),
        ("a [0-8] | [8-]", "has no text"),
    ],
)
def test_a_wrong_timeline_is_one_line_before_anything_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch, line: str, error: str
) -> None:
    monkeypatch.setattr(generate, "open_ranks", lambda *_, **__: pytest.fail("it was started"))
    assert error in make({"timeline": line}).error


def test_given_frames_are_in_the_record_and_decide_the_run(make: Make, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(tmp_path / "one.png")
    Image.fromarray(np.full((32, 32, 3), 20, np.uint8)).save(tmp_path / "two.png")
    given = {"prompt": "a red circle", "given": [f"first={tmp_path / 'one.png'}", f"last={tmp_path / 'two.png'}"]}
    shown = make(given)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[:2] == [
        "note: one.png is given at frame 0",
        "note: two.png is given at frames 13 to 16, as a still of 4 frames",
    ]
    assert [image["file"] for image in record_of(tmp_path)["given"]["images"]] == ["one.png", "two.png"]
    assert "finished already" in make(given).out
    assert "given.images" in make(given | {"given": given["given"][:1]}).error
    assert "given" in make().error  # none
    (tmp_path / "two.png").unlink()
    assert make(given).error == f"cannot read the picture {tmp_path / 'two.png'}: No such file or directory"
    elsewhere = given | {"output.path": tmp_path / "b.mp4"}
    assert make(elsewhere).error == f"cannot read the picture {tmp_path / 'two.png'}: No such file or directory"


def test_a_video_goes_on_from_kept_latents(make: Make, run: Callable[..., Run], tmp_path: Path) -> None:
    kept = tmp_path / "a.latents.safetensors"
    assert make({"video.num_frames": 9, "output.save_latents": kept}).code == 0
    on = {"extend": kept, "extend_shows": "new", "output.path": tmp_path / "b.mp4"}
    assert make(on | {"output.save_latents": tmp_path / "b.safetensors"}).code == 0
    assert count_frames(tmp_path / "b.mp4") == 8
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["video"]["num_frames"] == 8
    assert record["given"]["extend"] == {"file": kept.name, "start": 0, "stop": 9}
    assert run("decode", tmp_path / "b.safetensors", "--output", tmp_path / "c.mp4").code == 0
    assert (tmp_path / "c.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert "given.shows was 'new', now 'whole'" in make(on | {"extend_shows": "whole"}).error
    assert make({"extend_shows": "new"}).error == "--extend_shows new needs --extend"
    assert make({"extend": tmp_path / "gone.mp4", "output.path": tmp_path / "d.mp4"}).error.endswith(
        "gone.mp4: No such file or directory"
    )
