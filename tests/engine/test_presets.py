"""Presets read from Python are those of the command line."""

from pathlib import Path

import pytest

from engine import read_preset
from engine.errors import UserError
from engine.files.trees import read_yaml
from engine.presets import find_config, parse_tree
from launch.cli.parser import parse_run

SETTINGS = {"video.num_frames": 65, "method.freespec.alpha": 3, "sampler.negative_prompt": "blurred"}


@pytest.mark.parametrize("names", [("tiny-wan",), ("wan2.1-t2v-1.3b", "ablation/gb"), ("configs/tiny-ltx.yaml",)])
def test_the_same_as_on_the_command_line(names: tuple[str, ...]) -> None:
    words = [f"--config={name}" for name in names] + [f"--{key}={value}" for key, value in SETTINGS.items()]
    parsed = parse_run(words, name="x", description="", add_arguments=lambda parser: None)[1]
    assert read_preset(*names, settings=SETTINGS) == parsed
    assert read_preset(*names) != parsed


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (("nowhere",), {}, "give a file, or one of the presets"),
        (("tiny-wan",), {"sampler.nosuch": 1}, "does not accept option 'nosuch'"),
        (("tiny-wan",), {"sampler.num_steps": "many"}, "sampler.num_steps must be a whole number or null, got 'many'"),
        (
            ("tiny-wan",),
            {"sampler.timesteps": 5},
            "sampler.timesteps must be a list of numbers, as in [1000, 500] or null, got '5'",
        ),
        (("tiny-wan",), {"sampler.seed": None}, "sampler.seed must not be null"),
        (("tiny-wan",), {"method.freespec.alpha": -1}, "alpha must be a finite number, 0 or more"),
        (("ablation/gb",), {}, "required"),
        ((), {}, "required"),
    ],
)
def test_a_mistake_is_one_line(names: tuple[str, ...], settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_preset(*names, settings=settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "negative.txt").write_text("static\n")
    settings = {"sampler.negative_prompt": f"@{tmp_path / 'negative.txt'}"}
    assert read_preset("tiny-wan", settings=settings).sampler.negative_prompt == "static"


def test_former_names_of_settings(tmp_path: Path) -> None:
    """In presets and settings with a warning, in records without."""
    preset = tmp_path / "former.yaml"
    preset.write_text("output: {checkpoint_every: 3, crf: 20}\n")
    warning = "output.checkpoint_every is now output.snapshot_every; the old name works until the next release"
    with pytest.warns(FutureWarning, match=warning):
        made = read_preset("tiny-wan", str(preset)).output
    assert (made.snapshot_every, made.crf) == (3, 20)
    with pytest.warns(FutureWarning, match=warning):
        assert read_preset("tiny-wan", settings={"output.checkpoint_every": 4}).output.snapshot_every == 4
    with pytest.raises(UserError, match=r"former name of output.snapshot_every; give output.snapshot_every alone"):
        read_preset("tiny-wan", settings={"output.snapshot_every": 4, "output.checkpoint_every": 9})
    with pytest.warns(FutureWarning, match=warning):
        made = read_preset("tiny-wan", str(preset), settings={"output.snapshot_every": 4}).output
    assert (made.snapshot_every, made.crf) == (4, 20)
    preset.write_text("output: {checkpoint_every: 3, snapshot_every: 3}\n")
    with pytest.raises(UserError, match=r"former name of output.snapshot_every; give output.snapshot_every alone"):
        read_preset("tiny-wan", str(preset))
    record = read_yaml(find_config("tiny-wan")) | {"output": {"checkpoint_every": 6}}
    assert parse_tree(record).output.snapshot_every == 6
