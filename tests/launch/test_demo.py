"""demo.py: three videos of one prompt and seed, one picture, and a timeline, from one load; what is there is not made again."""

import dataclasses
import importlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.errors import UserError
from launch.arguments.demo import read
from launch.commands import demo
from tests.launch.conftest import SMALL, Run
from tests.launch.test_generate import names
from tests.launch.test_interruptions import interrupted_at_forward


def test_the_demo_makes_each_method_s_video_and_one_picture(
    run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = demo.LongVideoEngine.__init__
    monkeypatch.setattr(demo.LongVideoEngine, "__init__", lambda self, config: (loads.append(1), load(self, config))[1])
    # The tokenizer of a random model reads letters, so that the prompt is longer than with words.
    settings = SMALL | {"model.path": wan_folder, "out": tmp_path / "demo", "sampler.max_text_tokens": 64}
    words = [f"--{key}={value}" for key, value in settings.items()]
    shown = run("demo", *words)
    assert (shown.code, shown.err) == (0, "")
    assert len(loads) == 1
    methods = ("direct", "sliding_window", "freespec")
    wanted = {f"{name}.{kind}" for name in (*methods, "timeline") for kind in ("mp4", "png", "json")}
    wanted |= {"comparison.png"}
    assert names(tmp_path) == wanted
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == [
        str(tmp_path / "demo" / name)
        for name in (*(f"{name}.mp4" for name in (*methods, "timeline")), "comparison.png", "timeline.png")
    ]
    records = {name: json.loads((tmp_path / "demo" / f"{name}.json").read_text()) for name in methods}
    modes = {name: {step["mode"] for step in record["steps"]} for name, record in records.items()}
    assert (modes["direct"], modes["sliding_window"]) == ({"global"}, {"local"})
    assert "dual" in modes["freespec"]
    assert {record["config"]["method"]["name"] for record in records.values()} == set(methods)
    assert len({record["video"]["sha256"] for record in records.values()}) == 3
    with Image.open(tmp_path / "demo" / "comparison.png") as picture:
        assert 1000 <= picture.width <= 1400
    check_timeline(tmp_path / "demo", shown.out)

    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()}
    shown = run("demo", *words)
    assert (shown.code, shown.err, shown.out.count("\n")) == (0, "", 4)
    assert (shown.out.count("finished already, 17 frames"), shown.out.count("finished already, 9 frames")) == (3, 1)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()} == before
    assert len(loads) == 1
    without_a_timeline_it_alone_is_made(tmp_path / "demo", lambda: run("demo", *words))
    error = run("demo", *words, "--prompt", "a blue star").error
    assert error.startswith(
        f"{tmp_path / 'demo/direct.mp4'} exists already; choose another name or add --output.overwrite"
    )
    assert error.endswith(
        "; it was made with other settings: prompt was 'a red circle bounces over a blue background', now 'a blue star'"
    )
    shown = run("demo", *words, "--prompt", "a blue star", "--output.overwrite")
    assert (shown.code, shown.out.count("\n")) == (0, 6)
    assert names(tmp_path) == wanted
    assert {json.loads((tmp_path / f"demo/{name}.json").read_text())["prompt"] for name in methods} == {"a blue star"}


def check_timeline(folder: Path, out: str) -> None:
    """Half as long as the others: the second event begins with the middle one of three latent frames."""
    record = json.loads((folder / "timeline.json").read_text())
    assert (record["video"]["num_frames"], record["config"]["method"]["name"]) == (9, "freespec")
    first, second = demo.EVENTS
    events = [(event["text"], event["start"], event["stop"]) for event in record["timeline"]]
    assert events == [(first, 0, 5), (second, 5, 9)]
    assert out.endswith(f'/timeline.png: the timeline, "{first}", and from 0.3 s on "{second}"\n')


def without_a_timeline_it_alone_is_made(folder: Path, again: Callable[[], Run]) -> None:
    """As in a folder of a version that made none."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    timelines = {path.name for path in folder.glob("timeline.*")}
    for name in timelines:
        (folder / name).unlink()
    shown = again()
    assert (shown.code, shown.err, shown.out.count("finished already")) == (0, "", 3)
    assert "comparison.png" not in shown.out
    assert {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != before[path.name]} == timelines


@pytest.mark.parametrize("stage", ["denoise", "decode", "picture"])
def test_a_demo_that_was_stopped_goes_on(
    run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """In the second video, or before the picture; what is finished is not made again."""
    settings = SMALL | {"model.path": wan_folder, "sampler.max_text_tokens": 64}
    words = [f"--{key}={value}" for key, value in settings.items()]
    if stage == "denoise":
        with interrupted_at_forward(2 * SMALL["sampler.num_steps"] + 3):
            stopped = run("demo", *words, "--out", tmp_path / "demo")
    else:
        where = {"decode": "launch.video.make.decode_to_files", "picture": "launch.commands.demo.write_picture"}[stage]
        name = {"decode": "sliding_window.mp4", "picture": "comparison.png"}[stage]
        with monkeypatch.context() as patch:
            patch.setattr(where, stopping_at(name, where))
            stopped = run("demo", *words, "--out", tmp_path / "demo")
    finished = 4 if stage == "picture" else 1
    assert (stopped.code, stopped.out.count("\n")) == (130, finished)
    before = (tmp_path / "demo/direct.json").stat().st_mtime_ns
    shown = run("demo", *words, "--out", tmp_path / "demo")
    assert (shown.code, shown.err) == (0, ""), shown
    assert ("(continued after step 1)" in shown.out) == (stage == "denoise")
    assert shown.out.count("finished already") == finished
    assert (tmp_path / "demo/direct.json").stat().st_mtime_ns == before
    assert run("demo", *words, "--out", tmp_path / "whole").code == 0
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for name in ("direct", "sliding_window", "freespec", "timeline"):
        assert (tmp_path / f"demo/{name}.mp4").read_bytes() == (tmp_path / f"whole/{name}.mp4").read_bytes()


def stopping_at(name: str, where: str) -> Callable[..., Any]:
    """The function of this name, with an interruption in place of the call that is about this file."""
    module, _, attribute = where.rpartition(".")
    whole = getattr(sys.modules[module], attribute)

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(name in str(each) for each in args):
            signal.raise_signal(signal.SIGINT)
        return whole(*args, **kwargs)

    return call


def test_a_file_of_another_origin_is_not_replaced(
    run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.LongVideoEngine, "__init__", lambda *_: pytest.fail("the model was loaded"))
    settings = SMALL | {"model.path": wan_folder, "out": tmp_path, "sampler.max_text_tokens": 64}
    words = [f"--{key}={value}" for key, value in settings.items()]
    for name in ("comparison.png", "freespec.mp4"):
        (tmp_path / name).write_text("mine")
        error = run("demo", *words).error
        assert error == f"{tmp_path / name} exists already; choose another name or add --output.overwrite"
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize("num_frames", [1, 5])
def test_the_shortest_timeline_has_two_latent_frames(tmp_path: Path, num_frames: int) -> None:
    videos = demo.plan_videos(read(["--out", str(tmp_path), f"--video.num_frames={num_frames}"]))
    config = videos["timeline"].config
    assert (config.video.num_frames, videos["direct"].config.video.num_frames) == (5, num_frames)
    demo.look_at_prompts(config, [("the timeline", videos["timeline"].prompt)])
    with pytest.raises(UserError, match="exceeds the video"):  # as any of one latent frame
        one = dataclasses.replace(config, video=dataclasses.replace(config.video, num_frames=1))
        demo.look_at_prompts(one, [("the timeline", videos["timeline"].prompt)])


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("demo --out=", "out"),
        ("demo --folder=", "out"),
        ("demo --prompt=", "prompt"),
        ("compare --prompt=x --out=", "out"),
        ("compare --prompt=x --report=", "report"),
        ("analyze --prompt=x --out=", "out"),
        ("calibrate --prompts=x --judge_prompts=y --out=", "out"),
    ],
)
def test_an_empty_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)  # where an empty path would lead
    command, *words = command.split()
    with pytest.raises(UserError) as error:
        importlib.import_module(f"launch.arguments.{command}").read(words)
    assert str(error.value) == f"--{name} is empty; give a value, or leave it out"
