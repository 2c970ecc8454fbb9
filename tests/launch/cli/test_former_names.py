"""Options under their former names: accepted for one release, with one line on stderr."""

from argparse import SUPPRESS
from importlib import import_module
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.paths import REPOSITORY
from launch.arguments import analyze, batch, calibrate, compare, demo, evaluate, generate, serve
from launch.cli import parser
from launch.cli.start import COMMANDS
from launch.process.environment import LAUNCHER

PROMPTS = str(REPOSITORY / "configs/prompts/batch-demo.txt")


@pytest.fixture(autouse=True)
def _nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser._say_renamed.cache_clear()
    monkeypatch.chdir(tmp_path)  # some commands check that their default output can be written


def test_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    now, then = (generate.read([name, PROMPTS]) for name in ("--prompts", "--prompt_file"))
    assert now == then
    said = "note: --prompt_file is now --prompts; the old name works until the next release\n"
    assert capsys.readouterr().err == said
    assert generate.read([f"--prompt_file={PROMPTS}"]) == now
    assert capsys.readouterr().err == ""  # once
    assert analyze.read(["--prompts", PROMPTS]).prompts == now.prompts


def test_a_rank_of_the_launcher_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER, "1")
    generate.read(["--prompt_file", PROMPTS])
    assert capsys.readouterr().err == ""


def test_a_number_of_seeds_is_a_list_of_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--prompt", "a red circle", "--sampler.seed", "3"]
    assert compare.read(given).seeds == [3]
    assert compare.read([*given, "--seeds", "5,1"]).seeds == [5, 1]
    assert compare.read([*given, "--num_seeds", "2"]).seeds == [3, 4]
    assert capsys.readouterr().err.startswith("note: --num_seeds is now --seeds; ")
    with pytest.raises(UserError, match="at least one, such as --seeds 3; got 0"):
        compare.read([*given, "--num_seeds", "0"])


def test_both_lists_of_a_calibration() -> None:
    lists = ("configs/prompts/world-calibration-20.txt", "configs/prompts/world-heldout-40.txt")
    now = calibrate.read(["--prompts", lists[0], "--judge_prompts", lists[1], "--seeds", "0,1"])
    then = calibrate.read(["--prompt_file", lists[0], "--judge_prompt_file", lists[1], "--num_seeds", "2"])
    assert now.search == then.search
    assert now.held_out == then.held_out
    assert now.seeds == then.seeds == {"search": (0, 1), "judged": (0, 1)}


def test_the_suite_of_a_batch(tmp_path: object) -> None:
    words = ["--out", str(tmp_path)]
    assert batch.read(["--suite", PROMPTS, *words]) == batch.read(["--prompts", PROMPTS, *words])
    with pytest.raises(UserError, match="--suite is the former name of --prompts; give --prompts alone"):
        batch.read(["--suite", PROMPTS, "--prompts", PROMPTS, *words])


def test_steps_between_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting of a run, in presets too, and an option of batch.py and serve.py."""
    preset = tmp_path / "former.yaml"
    preset.write_text("output: {checkpoint_every: 3}\n")
    given = ["--prompt", "a red circle", "--config", "tiny-wan", "--config", str(preset)]
    assert generate.read(given).config.output.snapshot_every == 3
    works = "the old name works until the next release\n"
    said = f"note: output.checkpoint_every in {preset} is now output.snapshot_every; {works}"
    assert capsys.readouterr().err == said
    assert generate.read([*given, "--output.checkpoint_every", "4"]).config.output.snapshot_every == 4
    said = f"note: --output.checkpoint_every is now --output.snapshot_every; {works}"
    assert capsys.readouterr().err == said
    with pytest.raises(UserError, match=r"output.snapshot_every must be 0 \(only when stopped\) or more, got -1"):
        generate.read([*given, "--output.checkpoint_every", "-1"])
    words = ["--prompts", PROMPTS, "--out", str(tmp_path), "--checkpoint_every", "4"]
    assert batch.read(words).options.snapshot_every == 4
    assert serve.read(["--folder", str(tmp_path), "--checkpoint_every", "4"]).options.snapshot_every == 4
    said = "note: --checkpoint_every is now --snapshot_every; the old name works until the next release\n"
    assert capsys.readouterr().err == said


def test_the_last_preset_or_the_command_line_decides_under_either_name(tmp_path: Path) -> None:
    files = {"old": "checkpoint_every: 3", "new": "snapshot_every: 7", "null": "checkpoint_every: null"}
    files |= {"both": "{checkpoint_every: 3, snapshot_every: 5}", "default": "snapshot_every: 5"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"output: {text if text[0] == '{' else f'{{{text}}}'}\n")

    def read(*presets: str, words: str = "") -> int:
        given = [f"--config={name}" for name in ("tiny-wan", *(f"{preset}.yaml" for preset in presets))]
        return generate.read(["--prompt=a red circle", *given, *words.split()]).config.output.snapshot_every

    assert read("old", "new") == 7
    assert read("new", "old") == 3
    assert read("old", "new", "old") == 3
    assert read("old", "default") == 5
    assert read("old", words="--output.snapshot_every 4") == 4
    assert read("old", words="--output.snapshot_every 5") == 5  # the default
    assert read("new", words="--output.checkpoint_every 4") == 4
    assert read("null", "new") == 7
    with pytest.raises(UserError, match=r"output.snapshot_every must not be null"):
        read("null")
    with pytest.raises(
        UserError, match=r"^output.checkpoint_every in both.yaml is the former name of output.snapshot_every; give "
    ):
        read("both")
    with pytest.raises(UserError, match=r"^--print_config would leave out output.checkpoint_every; give present names"):
        read("old", words="--print_config")
    with pytest.raises(UserError, match=r"former name of --output.snapshot_every; give --output.snapshot_every alone"):
        read(words="--output.checkpoint_every 4 --output.snapshot_every 5")


def test_the_options_of_a_command_in_presets(tmp_path: Path) -> None:
    preset = tmp_path / "former.yaml"
    preset.write_text("num_seeds: 2\nsampler: {seed: 3}\n")
    given = ["--prompt", "a red circle", "--config", "tiny-wan", "--config", str(preset)]
    assert compare.read(given).seeds == [3, 4]
    assert compare.read([*given, "--sampler.seed", "6"]).seeds == [6, 7]
    assert compare.read([*given, "--seeds", "5,1"]).seeds == [5, 1]


def test_processes_that_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of evaluate.py; elsewhere --nproc is a number of ranks."""
    given = ["--runs", str(tmp_path)]
    assert evaluate.read([*given, "--nproc", "4"]) == evaluate.read([*given, "--workers", "4"])
    said = "note: --nproc is now --workers; the old name works until the next release\n"
    assert capsys.readouterr().err == said
    with pytest.raises(UserError, match="--workers must be 1 or more, got 0"):
        evaluate.read([*given, "--nproc", "0"])


def test_options_of_several_commands_have_one_help_text() -> None:
    """And their former names, wherever the option is."""
    helps: dict[str, set[str]] = {}
    for name in COMMANDS:
        command = parser.make_parser(name, "", "")
        import_module(f"launch.arguments.{name}").add_arguments(command)
        for action in command._actions:
            if action.help != SUPPRESS:  # a former name
                helps.setdefault(action.dest, set()).add(str(action.help))
        for option, former in (("prompts", "prompt_file"), ("seeds", "num_seeds")):
            keys = parser.Keys.of(command)
            assert (option in keys.leaves) == (former in keys.former), name
    for option, start in (
        ("prompts", "text file with one prompt a line"),
        ("methods", "comma-separated: METHOD, or METHOD:PRESET.yaml with its settings"),
        ("seeds", "comma-separated whole numbers"),
    ):
        assert len(helps[option]) > 1
        assert all(text.startswith(start) for text in helps[option]), helps[option]
    assert len(helps["nproc"]) == len(helps["workers"]) == 1


def test_out_names_the_files_of_every_command() -> None:
    video = generate.read(["--prompt", "x", "--out", "a.mp4"]).config.output.path
    assert video == generate.read(["--prompt", "x", "--output", "a.mp4"]).config.output.path == "a.mp4"
    assert demo.read(["--folder", "runs/x"]).folder == demo.read(["--out", "runs/x"]).folder


def test_former_names_are_in_no_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calibrate.read(["--help_all"])
    shown = capsys.readouterr().out
    assert "--judge_prompts" in shown
    assert "prompt_file" not in shown
    assert "num_seeds" not in shown
