"""What README and docs tell a reader to type: the Python example runs, commands parse, and files that they name are here."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

import engine
from engine.media.read_video import read_video

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^ {4}|`)(?:[A-Z_]+=\S+ )*(?:python|torchrun[^`\n]*?) (launch/(\w+)\.py[^`\n]*)", re.M)
PROMPTS = re.compile(r"--(?:prompt_file|judge_prompt_file|suite)[ =](\S+)")


def commands() -> list[tuple[str, str]]:
    """(page, command from the script on) of every `python launch/...` line, its continuation lines joined."""
    found = []
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text(encoding="utf-8"))
        found += [(page.name, match[1]) for match in COMMAND.finditer(text)]
    return found


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = [
        block for block in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S) if "read_preset" in block
    ]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    videos = [len(list(read_video(tmp_path / f"circle-{seed}.mp4"))) for seed in (0, 1)]
    assert videos == [65, 65]


def test_names_that_the_engine_exports() -> None:
    assert [name for name in engine.__all__ if getattr(engine, name).__name__ != name] == []


def test_there_are_commands_to_look_at() -> None:
    assert len(commands()) > 20
    assert {"README.md", "compare.md", "reliability.md"} <= {page for page, _ in commands()}


@pytest.mark.parametrize("command", [command for _, command in commands()])
def test_prompt_files_that_pages_name_are_here(command: str) -> None:
    names = [name for name in PROMPTS.findall(command) if not name.startswith("vbench:")]
    assert [name for name in names if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("command", sorted({command for _, command in commands()}))
def test_options_that_pages_name_are_known(command: str) -> None:
    """Each option of each line; `...` stands for others."""
    from engine.config import RunConfig  # noqa: PLC0415
    from launch.cli import Keys, make_parser  # noqa: PLC0415

    script, *words = shlex.split(command.partition("#")[0].split("&&")[0])
    name = Path(script).stem
    parser = make_parser(name, "", "")
    import_module(f"launch.arguments.{name}").add_arguments(parser)
    if name not in ("decode", "evaluate", "findings"):  # they have no settings of a run
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(RunConfig, nested_key=None)
    keys = Keys.of(parser)
    options = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    unknown = [
        key
        for key in options
        if not keys.knows(key) and key not in ("help", "help_all", "config", "output", "model", "method")
    ]
    assert unknown == []


def test_files_that_commands_name_are_in_the_wheel() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = told["tool"]["setuptools"]["package-data"]["*"]
    found = told["tool"]["setuptools"]["packages"]["find"]["include"]
    shipped = [
        path
        for folder in ("configs", "tiny")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert len(shipped) > 30
    assert [
        path for path in shipped if path.suffix != ".py" and not any(fnmatch(path.name, each) for each in patterns)
    ] == []
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in shipped}
    assert [name for name in packages if not any(fnmatch(name, each) for each in found)] == []
    module, _, function = told["project"]["scripts"]["freespec"].partition(":")
    assert callable(getattr(import_module(module), function))
