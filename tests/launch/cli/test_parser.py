"""Settings: presets, overrides, and a clear line for each way to get them wrong. No model is loaded here."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from engine.config import RunConfig
from engine.errors import UserError
from launch.arguments import generate as arguments
from launch.arguments.prompts import read_prompts
from launch.cli import parser
from launch.cli.parser import make_parser, parse_run
from launch.cli.start import COMMANDS
from launch.cli.suggestions import nearest_key
from tests.launch.conftest import Run

ROOT = Path(__file__).parents[3]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))


def nothing(parser: ArgumentParser) -> None:
    """A command without arguments of its own."""


def parse(*argv: object) -> RunConfig:
    """The RunConfig of an argv."""
    return parse_run([str(word) for word in argv], name="test.py", description="", add_arguments=nothing)[1]


def dotted(tree: dict, prefix: str = "") -> dict[str, object]:
    """A nested dict with dotted keys, and lists for tuples."""
    flat = {}
    for key, value in tree.items():
        plain = list(value) if isinstance(value, tuple) else value
        flat |= dotted(plain, f"{prefix}{key}.") if isinstance(plain, dict) else {f"{prefix}{key}": plain}
    return flat


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_values_reach_the_configuration(preset: Path) -> None:
    config = dotted(dataclasses.asdict(parse("--config", preset)))
    wanted = dotted(yaml.safe_load(preset.read_text()))
    assert {key: config[key] for key in wanted} == wanted


def test_a_parser_that_has_read_other_words_reads_like_a_new_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read() -> list[RunConfig | str]:
        found: list[RunConfig | str] = []
        for words in (
            ["--config=tiny-ltx", "--video.fps=30"],
            ["--video.fps=x"],
            ["--help"],
            [],
            ["--config=tiny-ltx"],
        ):
            try:
                found.append(parse(*words))
            except UserError as error:
                found.append(str(error))
            except SystemExit:
                found.append(capsys.readouterr().out)
        return found

    kept = read()
    assert read() == kept
    monkeypatch.setattr(parser, "_run_parser", parser._run_parser.__wrapped__)
    monkeypatch.setattr(parser._run_parser, "__wrapped__", parser._run_parser, raising=False)
    assert read() == kept
    assert len({str(each) for each in kept}) == len(kept)


def test_without_a_preset_it_is_the_embedded_model_wherever_one_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse() == parse("--config", ROOT / "configs/tiny-wan.yaml") == parse("--config", "configs/tiny-wan.yaml")


def test_a_preset_does_not_inherit_from_the_default_one() -> None:
    assert parse("--config", ROOT / "configs/wan2.1-t2v-1.3b.yaml").sampler.max_text_tokens == 512
    assert parse().sampler.max_text_tokens == 32


def test_overrides_win_wherever_they_stand_and_later_presets_win_over_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "[2nd].yaml"
    first.write_text((ROOT / "configs/tiny-wan.yaml").read_text())
    second.write_text("video:\n  fps: 30\n  num_frames: 65\nmethod:\n  freespec:\n    alpha: 1.5\n")
    config = parse("--video.num_frames", 33, "--config", first, f"--config={second}")
    assert (config.video.num_frames, config.video.fps, config.method.freespec.alpha) == (33, 30, 1.5)
    assert config.video.height == 64


def test_presets_by_name_from_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = parse("--config", ROOT / "configs/wan2.1-t2v-1.3b.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("wan2.1-t2v-1.3b", "wan2.1-t2v-1.3b.yaml", "configs/wan2.1-t2v-1.3b", "configs/wan2.1-t2v-1.3b.yaml"):
        assert parse("--config", name) == whole
    assert parse("--config", "tiny-wan", "--config", "ablation/gb").method.freespec.basis == "global"
    Path("tiny-wan.yaml").write_text((ROOT / "configs/tiny-ltx.yaml").read_text())
    assert parse("--config", "tiny-wan").model.path == "tiny/ltx"  # a file of one's own is nearer


def test_a_group_given_one_word_is_the_setting_that_everybody_sets() -> None:
    config = parse("--output", "a.mp4", "--model=b/c", "--method", "direct")
    assert (config.output.path, config.model.path, config.method.name) == ("a.mp4", "b/c", "direct")


def test_values_of_every_kind() -> None:
    config = parse(
        *(
            "--sampler.flow_shift",
            "null",
            "--sampler.guidance_scale=4",
            "--output.trace",
            "--output.overwrite",
            "false",
        ),
        *("--sampler.negative_prompt", "-blurred: yes", "--model.revision", "12", "--output.progress", "on"),
        *("--method.freespec.rank=false", "--model.path", "a b/c"),
    )
    assert config.sampler.flow_shift is None
    assert config.sampler.guidance_scale == 4.0
    assert config.output.trace is True
    assert config.output.overwrite is False
    assert config.sampler.negative_prompt == "-blurred: yes"
    assert config.model.revision == "12"
    assert config.output.progress == "on"
    assert config.method.freespec.rank is False
    assert config.model.path == "a b/c"


MISTAKES = {
    "--vidoe.num_frames 3": "unknown setting vidoe.num_frames; did you mean video.num_frames?",
    "--num_frames 3": "did you mean video.num_frames?",
    "--video.num_frame 3": "did you mean video.num_frames?",
    "--method.freespec.betta 3": "did you mean method.freespec.beta?",
    "--method.windw=3": "did you mean method.window_frames?",
    "--method.freespec.split 0.4": "fused_share 0.6 with domain timestep, 0.4 with domain step",
    "--method.freepca.split=0.25": "counted from noise: fused_share 0.75",
    "--zzz 3": "unknown setting zzz; see --help",
    "--model.offload true": "unknown setting model.offload; did you mean model.weights?",
    "--video.num_frames": "--video.num_frames needs a value",
    "--video.num_frames --video.fps 3": "--video.num_frames needs a value",
    "--video.num_frames abc": "video.num_frames must be a whole number, got 'abc'",
    "--video.num_frames 1.5": "video.num_frames must be a whole number, got '1.5'",
    "--sampler.guidance_scale high": "sampler.guidance_scale must be a number, got 'high'",
    "--sampler.flow_shift high": "sampler.flow_shift must be a number or null, got 'high'",
    "--output.trace maybe": "output.trace must be true or false, got 'maybe'",
    "--model.dtype int8": "model.dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
    "--method.freespec.basis both": "method.freespec.basis must be one of local, global, got 'both'",
    "--video 3": "--video is a group of settings; give them one by one",
    "--output": "--output needs a value",
    "--output a.avi": "output.path must end in .mp4, .gif, .webp, or in / for a folder of PNG frames, got 'a.avi'",
    "--output a": "output.path must end in .mp4, .gif, .webp, or in / for a folder of PNG frames, got 'a'",
    "--output a.mp4/": "the folder of output.path must have a name without a dot, got 'a.mp4/'",
    "--output ../": "the folder of output.path must have a name without a dot, got '../'",
    "--output .gif": "output.path must end in .mp4",
    "--output a.gif --video.fps 60": ".gif takes at most 50 frames per second, and video.fps is 60; lower it, or write an .mp4",
    "--output a.webp --video.fps 120": ".webp takes at most 90 frames per second, and video.fps is 120",
    "--output a.webp --video.height 16384": ".webp takes sides of less than 16384 pixels, got 16384 x 64; write an .mp4",
    "--output.metadata maybe": "output.metadata must be true or false, got 'maybe'",
    "--model.single_file high:a.gguf --model.single_file low:b.gguf": (
        '--model.single_file is given 2 times, high:a.gguf and low:b.gguf; give one list, --model.single_file "[high:a.gguf, low:b.gguf]"'
    ),
    "--model.loras [a,b] --video.fps 8 --model.loras=c": 'is given 2 times, [a,b] and c; give one list, --model.loras "[a,b, c]"',
    "--sampler.timesteps 1000 --sampler.timesteps 500": 'give one list, --sampler.timesteps "[1000, 500]"',
    "--help_al": "unknown setting help_al; see --help",
    "stray": "unexpected argument 'stray'",
    "--sampler.num_steps -3": "sampler.num_steps must lie in [1, 10000], got -3",
    "--sampler.num_steps 0": "sampler.num_steps must lie in [1, 10000], got 0",
    f"--sampler.num_steps {10**4000}": "sampler.num_steps must lie in [1, 10000], got a number of 13288 bits",
    f"--video.fps {2**40}": "video.fps must lie in [1, 1000], got 1099511627776",
    "--video.num_frames 100000000000": "video.num_frames must lie in [1, 1000000], got 100000000000",
    "--video.height 1000000": "video.height must lie in [1, 16384], got 1000000",
    "--sampler.max_text_tokens 1000000": "sampler.max_text_tokens must lie in [1, 65536], got 1000000",
    f"--config {'x' * 5000}": f"cannot look for --config {'x' * 60}: File name too long",
    "--config /": "--config / does not exist",
    "--config a\0b": "has a zero byte, which no file name has",
    "--method.name freespecc": "did you mean 'freespec'?",
    "--method.name magic": "choose one of direct, sliding_window, freenoise, freelong, freelong_pp, freepca, ultravico, lvsa, freeloc, freespec, direct_far",
    "--method.freespec.alpha -1": "alpha must be a finite number, 0 or more, got -1",
    "--attention.complement sge": "unknown attention.complement 'sge'; choose one of same, sage",
    "--attention.far 1/8 --method lvsa": "attention.far 1/8 thins the keys of dual steps, and method lvsa has steps of other kinds (frames); set attention.far all",
    "--method ultravico --attention.dual triton": "method ultravico attends to the keys outside the windows in its own way",
    "--attention.kernel warp": "unknown attention.kernel 'warp'; choose one of auto, plain",
    "--output.path a.avi": "output.path must end in .mp4, .gif, .webp, or in / for a folder of PNG frames, got 'a.avi'",
    "--parallel.timeout 1e15": "parallel.timeout must be more than 0 and at most 604800 seconds (a week), got 1000000000000000.0",
    "--parallel.timeout 604801": "parallel.timeout must be more than 0 and at most 604800 seconds (a week), got 604801",
    "--output.crf 99": "output.crf must lie in [0, 51], got 99",
    "--config nowhere.yaml": "--config nowhere.yaml does not exist",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_in_a_setting(run: Callable[..., Run], words: str) -> None:
    assert MISTAKES[words] in run("generate", "--prompt", "a red circle", *words.split()).error


@pytest.mark.parametrize("command", ["generate", "decode"])
def test_bytes_that_are_no_text_are_refused_before_anything_is_loaded(
    run: Callable[..., Run], command: str, tmp_path: Path
) -> None:
    word = os.fsdecode(b"a\xff.mp4")
    for words in (("--prompt", word), (f"--output.path={word}",), ("--output", word), (word,), (f"--{word}", "3")):
        error = run(command, "--model.path", "/never/read", *words).error
        assert "a\\udcff.mp4" in error
        assert "is not UTF-8 text; write it, or rename the file, in UTF-8" in error


FILES = {
    b"video:\n  num_frame: 3\n": "unknown setting video.num_frame in {path}; did you mean video.num_frames?",
    b"vidoe:\n  num_frames: 3\n": "unknown setting vidoe.num_frames in {path}; did you mean video.num_frames?",
    b"video:\n  num_frames: many\n": "video.num_frames must be a whole number, got 'many'",
    b"method:\n  freepca:\n    split: 0.25\n": "unknown setting method.freepca.split in {path}; split is now fused_share, the share "
    "of the run that fuses, counted from noise: fused_share 0.75",
    b"video: 3\n": "video in {path} is a group of settings, got 3",
    b"sampler:\n": "sampler in {path} is a group of settings, got None",
    b"method: direct\n": "method in {path} is a group of settings, got 'direct'; write method: {{name: direct}}",
    b"video: [1\n": "{path}, line 2: not YAML",
    b"": "{path} holds no settings; configs/tiny-wan.yaml is an example",
    b"only words": "{path} holds no settings",
    b"method: {settings: " + b"[" * 3000 + b"]" * 3000 + b"}": "{path} is nested too deeply",
    b"method: {settings: " + b"{a: " * 150 + b"1" + b"}" * 151: "{path} is nested more than 100 deep",
    b"method: {settings: &a {b: *a}}": "{path} is nested more than 100 deep",
    b"a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 106)
    ): "more than 100000 values",
    b"video: {fps: " + b"9" * 5000 + b"}": "{path} holds an invalid value (Exceeds the limit",
    b"output: {path: 2020-99-99}": "{path} holds an invalid value (month must be in 1..12)",
    b"\xff\xfe\x00": "{path} is not UTF-8 text",
    b"video:\n  num_frames: 33\n": "model.path",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: str(content[:30]))
def test_a_mistake_in_a_preset(run: Callable[..., Run], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert FILES[content].format(path=path) in run("generate", "--prompt", "x", "--config", path).error


@pytest.mark.parametrize("key", ["video.fps", "decode.mode", "sampler.seed", "output.crf", "method.freespec.alpha"])
def test_null_is_refused_where_it_has_no_meaning(run: Callable[..., Run], tmp_path: Path, key: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(": {".join(key.split(".")) + ": null" + "}" * key.count("."))
    words = ("--prompt", "x", "--config", "tiny-wan", "--config", path)
    assert run("generate", *words).error == f"{key} must not be null"
    path.write_text("sampler: {flow_shift: null}\nparallel: {cfg: null}")
    assert run("generate", *words, "--print_config").code == 0


def test_the_nearest_key_is_found_for_every_key_with_one_letter_missing() -> None:
    keys = sorted(dotted(dataclasses.asdict(parse())))
    for key in keys:
        middle = (key.rindex(".") + 1 + len(key)) // 2
        assert nearest_key(key[:middle] + key[middle + 1 :], keys) == key
    assert nearest_key("qqqqqq", keys) is None


def options_shown(text: str) -> list[str]:
    """The options that a help text has an entry for."""
    return re.findall(r"^  (?:-h, )?--([\w.]+)", text, re.MULTILINE)


def test_help_is_short_and_shows_nothing_that_is_refused(run: Callable[..., Run]) -> None:
    shown = run("generate", "--help").out
    assert {"prompt", "prompts", "config", "nproc", "help_all", "model.path", "video.num_frames"} <= {
        *options_shown(shown)
    }
    assert {"sampler.seed", "method.name", "output.path", "output.overwrite"} <= {*options_shown(shown)}
    assert len(options_shown(shown)) <= 27
    assert "attention.kernel" not in shown
    for word in ("CONFIG", "default config file"):  # `--model CONFIG` is what a parser of groups offers
        assert word not in shown.replace("--config CONFIG", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_only_what_the_command_takes(run: Callable[..., Run], name: str) -> None:
    """Each option that is shown is given alone: it is never unknown or unread."""
    shown = options_shown(run(name, "--help").out)
    every = options_shown(run(name, "--help_all").out)
    assert {*shown} <= {*every}
    for option in {*shown, *(each for each in every if each.startswith("output."))} - {
        "help",
        "help_all",
        "print_config",
    }:
        missing = [f"--{file}=/nowhere" for file in ("config", "study") if file in every]  # so that nothing is made
        said = run(name, f"--{option}=?", *missing).err
        for word in ("unknown setting", "group of settings", "refused", "is not read", "leave --method.name out"):
            assert word not in said


def test_help_all_shows_every_setting_with_its_meaning_and_the_preset_s_value(run: Callable[..., Run]) -> None:
    shown = run("generate", "--help_all", "--config", "wan2.1-t2v-1.3b")
    assert (shown.code, shown.err) == (0, "")
    for key in [*dotted(dataclasses.asdict(parse())), "prompt", "prompts", "config"]:
        assert f"--{key} " in shown.out
    words = " ".join(shown.out.split())
    assert "frames of the video, 4k + 1 for Wan and 8k + 1 for LTX-Video. (type: int, default: 321)" in words
    assert "pixels, a multiple of 16 for Wan, of 32 for LTX-Video. (type: int, default: 480)" in words
    assert "frames per second of the file, at most 1000. (type: int, default: 16)" in words


@pytest.mark.parametrize("command", ["generate", "decode", "demo"])
def test_every_command_has_help_and_knows_its_settings(run: Callable[..., Run], command: str) -> None:
    shown = run(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert "usage:" in shown.out
    assert "unknown setting nonsense" in run(command, "--nonsense").error


@pytest.mark.parametrize(
    ("called", "usage"),
    [
        ("launch/compare.py", "compare.py"),
        ("/usr/bin/freespec", "freespec compare"),
        ("launch/__main__.py", "python -m launch compare"),
        ("pytest/__main__.py", "compare.py"),
    ],
)
def test_usage_names_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch, called: str, usage: str) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert make_parser("compare.py", "[--out FOLDER]", "").format_usage() == f"usage: {usage} [--out FOLDER]\n"


def test_the_printed_configuration_is_a_preset_that_gives_the_same(run: Callable[..., Run], tmp_path: Path) -> None:
    words = ("--video.fps", "30", "--method.freespec.residual", "none", "--output.progress", "off")
    shown = run("generate", *words, "--print_config")
    assert (shown.code, shown.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(shown.out)

    def add(parser: ArgumentParser) -> None:
        arguments.add_arguments(parser)

    again = parse_run(["--config", str(tmp_path / "printed.yaml")], name="x", description="", add_arguments=add)[1]
    assert again == parse(*words)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red circle\r\n\n  ein grüner Stern \n\n".encode())
    assert read_prompts(None, str(path)).named == [
        ("line 1 of prompts.txt", "a red circle"),
        ("line 3 of prompts.txt", "ein grüner Stern"),
    ]
    assert read_prompts("a: b", None).named == [("the prompt", "a: b")]


@pytest.mark.parametrize(
    ("prompt", "content", "words"),
    [
        (None, None, "give one of --prompt TEXT, --timeline EVENTS and --prompts FILE"),
        ("x", b"y", "give one of --prompt TEXT, --timeline EVENTS and --prompts FILE"),
        ("  ", None, "--prompt is empty"),
        (None, b"", "has no prompt"),
        (None, b"\n  \n", "has no prompt"),
        (None, b"a \xff", "prompts.txt, line 1: not UTF-8 text (byte 3 of the line)"),
    ],
)
def test_a_mistake_in_the_prompts(tmp_path: Path, prompt: str | None, content: bytes | None, words: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(prompt, str(path) if content is not None else None)
    assert words in str(error.value)


def test_a_prompt_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="cannot read --prompts"):
            read_prompts(None, str(path))
