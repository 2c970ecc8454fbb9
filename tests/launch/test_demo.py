"""demo.py: three videos of one prompt and seed from one load, one picture, and the same again over the old files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from launch.commands import demo
from tests.launch.conftest import SMALL, Run
from tests.launch.test_generate import names


def test_the_demo_makes_each_method_s_video_and_one_picture(
    run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = demo.LongVideoEngine.__init__
    monkeypatch.setattr(demo.LongVideoEngine, "__init__", lambda self, config: (loads.append(1), load(self, config))[1])
    # The tokenizer of a random model reads letters, so that the prompt is longer than with words.
    settings = SMALL | {"model.path": wan_folder, "folder": tmp_path / "demo", "sampler.max_text_tokens": 64}
    words = [f"--{key}={value}" for key, value in settings.items()]
    shown = run(demo.main, *words)
    assert (shown.code, shown.err) == (0, "")
    assert len(loads) == 1
    methods = ("direct", "sliding_window", "freespec")
    wanted = {f"{name}.{kind}" for name in methods for kind in ("mp4", "png", "json")} | {"comparison.png"}
    assert names(tmp_path) == wanted
    assert shown.out.count("\n") == 4
    records = {name: json.loads((tmp_path / "demo" / f"{name}.json").read_text()) for name in methods}
    modes = {name: {step["mode"] for step in record["steps"]} for name, record in records.items()}
    assert (modes["direct"], modes["sliding_window"]) == ({"global"}, {"local"})
    assert "dual" in modes["freespec"]
    assert {record["config"]["method"]["name"] for record in records.values()} == set(methods)
    assert len({record["video"]["sha256"] for record in records.values()}) == 3
    with Image.open(tmp_path / "demo" / "comparison.png") as picture:
        assert 1000 <= picture.width <= 1400

    assert run(demo.main, *words).code == 0
    assert names(tmp_path) == wanted
    again = json.loads((tmp_path / "demo" / "freespec.json").read_text())
    assert again["video"]["sha256"] == records["freespec"]["video"]["sha256"]
