"""Which sidecars of a comparison count as whole, and which are made again."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from engine.batch.files import BatchFiles
from engine.batch.items import Item
from engine.batch.suite import Prompt
from evaluation.comparison.store import Video

TIMED = [{"text": "a", "start": 0, "stop": 1}]
RUN = {
    "resumed_at": 0,
    "seconds": {"denoise": 1.0, "decode": 1.0},
    "steps": [{"mode": "direct", "seconds": 1.0}],
    "device": {"name": "x", "cpu_threads": 1},
    "parallel": {"ranks": 1},
    "versions": {"torch": "2"},
    "git": None,
    "model": {"sha256": {"a.safetensors": "0"}},
    "timeline": None,
}


def checked(tmp_path: Path, changed: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a video is done whose sidecar has `changed` at these dotted keys of its run, and the lines about it."""
    prompt = Prompt(prompt_id="p0000", line=1, text="a red circle")
    item = Item(item_id="0" * 16, config_id="0" * 12, variant="direct", method="direct", prompt=prompt, seed=0)
    video = Video(item=item, files=BatchFiles(root=tmp_path).of(item))
    video.files.make_folders()
    video.files.video.write_bytes(b"x")
    run = copy.deepcopy(RUN)
    for dotted, value in changed.items():
        *path, last = dotted.split(".")
        part: dict[str, Any] = run
        for key in path:
            part = part[key]
        part[last] = value
    output = {"file": video.files.video.name, "bytes": 1, "sha256": "0"}
    sidecar = {"item_id": item.item_id, "output": output, "video": {}, "run": run}
    video.files.sidecar.write_text(json.dumps(sidecar))
    lines: list[str] = []
    return video.check(say=lines.append), [line.partition(": ")[2] for line in lines]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"timeline": TIMED},
        {"model": {"commit": "0"}},
        {"model.single_file": None},
        {"model.single_file": {"name": "a", "sha256": "0"}},
    ],
)
def test_every_kind_of_record_is_whole(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert checked(tmp_path, changed) == (True, [])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("timeline", 5, "run.timeline is 5"),
        ("timeline", "x", "run.timeline is 'x'"),
        ("timeline", [1, 2], "in run.timeline, it holds no keys"),
        ("timeline", [{"text": "a", "start": 0}], "in run.timeline, it has no stop"),
        ("model.sha256", 5, "run.model.sha256 is 5"),
        ("model.sha256", "x", "run.model.sha256 is 'x'"),
        ("model.sha256", [1, 2], "run.model.sha256 is [1, 2]"),
        ("model.sha256", {"a": 1}, "in run.model.sha256, an item is 1"),
        ("model.commit", 5, "run.model.commit is 5"),
        ("model.single_file", "x", "it has no run.model.single_file.name"),
        ("device", {}, "it has no run.device.name"),
    ],
)
def test_a_sidecar_of_a_wrong_type_is_made_again(tmp_path: Path, key: str, value: object, said: str) -> None:
    assert checked(tmp_path, {key: value}) == (False, [f"{said}; it is made again"])
