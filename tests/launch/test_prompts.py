"""Messages about prompts before a model is loaded: long ones by line, unknown words, unused texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from engine.paths import REPOSITORY
from engine.planner import cpu
from launch.arguments.prompts import read_prompts
from launch.batching import comparison as comparison_make
from launch.cli.parser import parse_run
from launch.commands import batch, calibrate, demo, generate
from tests.launch.conftest import SMALL, Run

TINY = SMALL | {"video.height": 64, "video.width": 64, "sampler.num_steps": 8, "method.window_frames": 3}
KNOWN = "a red circle bounces over a blue background"
LONG = " ".join(["circle"] * 40)


class LoadedError(Exception):
    """The model would be loaded now."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise LoadedError

    for module in (comparison_make, demo, generate):
        monkeypatch.setattr(module, "LongVideoEngine", load)
    monkeypatch.setattr(batch, "make", load)


@pytest.fixture
def commands(run: Callable[..., Run], tmp_path: Path) -> dict[str, Callable[..., Run]]:
    """Each command on the lines of a file, which it may have to be given twice."""
    out, file = tmp_path / "out", tmp_path / "prompts.txt"
    (tmp_path / "judge.txt").write_text("a blue star moves up over a green background\n")

    def call(command: str, *words: str) -> Callable[..., Run]:
        def start(lines: list[str], **settings: object) -> Run:
            file.write_text("\n".join(lines) + "\n")
            return run(command, *words, *(f"--{key}={value}" for key, value in (TINY | settings).items()))

        return start

    from_file = f"--prompts={file}"
    searched = ["--num_trials=2", "--rounds=1", f"--judge_prompts={tmp_path / 'judge.txt'}"]
    return {
        "generate": call("generate", from_file, f"--output.path={out}/a.mp4"),
        "compare": call("compare", from_file, f"--out={out}", "--methods=direct,freespec"),
        "analyze": call("analyze", from_file, f"--out={out}"),
        "calibrate": call("calibrate", from_file, f"--out={out}", *searched),
        "batch": call("batch", f"--prompts={file}", f"--out={out}"),
        "batch --dry_run": call("batch", f"--prompts={file}", f"--out={out}", "--dry_run"),
    }


NAMES = ["generate", "compare", "analyze", "calibrate", "batch", "batch --dry_run"]


@pytest.mark.parametrize("name", NAMES)
def test_all_that_are_too_long_are_named_at_the_start(
    commands: dict[str, Callable[..., Run]], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "calibrate":  # its prompts must be captions, which are short
        monkeypatch.setattr(calibrate, "not_world", lambda comparison: None)
    line = commands[name]([KNOWN, "", LONG, f"{LONG} {LONG}"]).error
    assert line == (
        "2 prompts have more tokens than sampler.max_text_tokens, which is 32: line 3 of prompts.txt (41), line 4 of prompts.txt "
        "(81); shorten them or raise the setting"
    )
    assert not list((tmp_path / "out").rglob("*.mp4"))


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_prompt_that_is_too_long_is_called_so(commands: dict[str, Callable[..., Run]], name: str) -> None:
    line = commands[name]([KNOWN], **{"sampler.negative_prompt": LONG}).error
    assert line.startswith("the negative prompt has 41 tokens, and sampler.max_text_tokens is 32; shorten it or raise")


@pytest.mark.parametrize("name", NAMES)
def test_unused_negative_prompt_is_reported(
    commands: dict[str, Callable[..., Run]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings = {"sampler.negative_prompt": "a red star", "sampler.guidance_scale": 1}
    out = start(commands[name], capsys, [KNOWN], settings)
    assert out.count("note: ") == 1
    assert (
        "note: sampler.negative_prompt is not used: with sampler.guidance_scale 1 there is no unconditional pass\n"
        in out
    )
    assert "note: " not in start(commands[name], capsys, [KNOWN], {"sampler.negative_prompt": "a red star"})


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_one_side_of_the_split_are_reported(
    commands: dict[str, Callable[..., Run]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    settings = {"sampler.num_steps": "null", "sampler.timesteps": "[1000, 937.5, 833.3, 625]"}
    settings |= {"method.freespec.domain": "timestep"}
    [note] = [line for line in start(commands[name], capsys, [KNOWN], settings).splitlines() if "note: " in line]
    assert note == (
        "note: with freespec each of the 4 steps (timesteps 1000 to 625) fuses, and none is local; method.freespec.domain step "
        "splits by the number of steps"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "calibrate"])
def test_words_that_the_model_does_not_know_are_named(
    commands: dict[str, Callable[..., Run]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = start(commands[name], capsys, [KNOWN, "a dragon flies over a castle"], {})
    [note] = [line for line in out.splitlines() if line.startswith("note: ")]
    assert note.startswith(
        'note: 3 words are unknown to the model and ignored: "dragon" (line 2 of prompts.txt), "flies" '
    )
    assert note.endswith("tiny/wan/README.md")


def test_the_demonstration_says_so_too(
    run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--{key}={value}" for key, value in TINY.items()]
    with pytest.raises(LoadedError):
        run("demo", *words, f"--out={tmp_path}", "--prompt=a dragon")
    assert capsys.readouterr().out.startswith('note: 1 word is unknown to the model and ignored: "dragon" (the')


def test_a_negative_prompt_of_a_file_is_recorded_as_its_text(
    commands: dict[str, Callable[..., Run]], tmp_path: Path
) -> None:
    (tmp_path / "negative.txt").write_text(f"{LONG}\n")
    line = commands["generate"]([KNOWN], **{"sampler.negative_prompt": f"@{tmp_path / 'negative.txt'}"}).error
    assert line.startswith("the negative prompt has 41 tokens")
    preset = (REPOSITORY / "configs/tiny-wan.yaml").read_text()
    preset = preset.replace("sampler:\n", f"sampler:\n  negative_prompt: '@{tmp_path / 'gone.txt'}'\n")
    (tmp_path / "preset.yaml").write_text(preset)
    line = commands["batch"]([KNOWN], config=tmp_path / "preset.yaml").error
    assert line.startswith(f"cannot read --sampler.negative_prompt {tmp_path / 'gone.txt'}: No such file")
    (tmp_path / "gone.txt").write_text("blurred\n")
    words = [f"--config={tmp_path / 'preset.yaml'}"]
    _, config = parse_run(words, name="test", description="", add_arguments=lambda parser: None)
    assert config.sampler.negative_prompt == "blurred"


def start(
    command: Callable[..., Run], capsys: pytest.CaptureFixture[str], lines: list[str], settings: dict[str, object]
) -> str:
    """What a command says on stdout until it would load the model; a dry run ends by itself."""
    try:
        return command(lines, **settings).out
    except LoadedError:
        return capsys.readouterr().out


def test_a_list_that_comes_with_the_program_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its presets are; a file of the working directory comes first."""
    name = "configs/prompts/batch-demo.txt"
    shipped = (Path(__file__).parent.parent.parent / name).read_text().split("\n")[0]
    monkeypatch.chdir(tmp_path)
    assert read_prompts(None, name).texts[0] == shipped
    (tmp_path / "configs/prompts").mkdir(parents=True)
    (tmp_path / name).write_text("a cat\n")
    assert read_prompts(None, name).texts == ["a cat"]
    with pytest.raises(UserError, match=r"cannot read --prompts nowhere\.txt: No such file"):
        read_prompts(None, "nowhere.txt")


@pytest.mark.parametrize("name", NAMES)
def test_a_long_job_on_a_cpu_says_what_it_takes(
    commands: dict[str, Callable[..., Run]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "on this CPU" not in start(commands[name], capsys, [KNOWN], {"model.device": "cpu"})
    monkeypatch.setattr(cpu, "product_rate", lambda dtype: 1e3)
    out = start(commands[name], capsys, [KNOWN], {"model.device": "cpu"})
    assert "note: on this CPU a video of 17 frames of 64 x 64 takes about " in out
