"""What `pip install .` installs: one library, its command, and the files that the command names by default."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import engine
import freespec
from engine.paths import REPOSITORY
from launch.cli.start import COMMANDS


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel, in a folder of their own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    for name in ("engine", "parallel", "freespec", "launch", "configs", "tiny", "metrics", "evaluation"):
        (source / name).symlink_to(REPOSITORY / name)
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def freespec_command(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder, without this checkout on the import path."""
    code = (
        f"import sys; sys.path[:] = [place for place in sys.path if place not in ('', {str(REPOSITORY)!r})]; "
        f"sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in str(each)]; "
        f"sys.path.insert(0, {str(installed)!r}); import launch; assert launch.__file__.startswith({str(installed)!r}); "
        f"from launch.cli.console import main; sys.argv = ['freespec', *{list(words)!r}]; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


def test_one_library_and_its_command(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"engine", "parallel", "freespec", "launch"}
    for name in ("engine", "parallel", "freespec"):
        assert (installed / name / "py.typed").exists()
    assert (installed / "launch/serving/page.html").is_file()
    assert freespec.__version__ == engine.__version__
    assert (installed / f"freespec_engine-{engine.__version__}.dist-info").is_dir()
    assert not list((installed / "engine" / "shipped").rglob("*.py"))


def test_what_needs_a_checkout_is_not_installed(installed: Path) -> None:
    """Every module of the wheel imports only what the wheel has; `launch/batch.py` looks for VBench's suites when asked to."""
    missing = {}
    for path in (installed / "launch").rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            names = [each.name for each in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []
            ours = [name for name in names if (REPOSITORY / name.partition(".")[0]).is_dir()]
            lacking = [name for name in ours if not _holds(installed, name)]
            missing |= {path.relative_to(installed): lacking} if lacking else {}
    assert missing == {}
    lacked = {name for name in COMMANDS if not (installed / "launch" / "commands" / f"{name}.py").exists()}
    assert lacked == {"analyze", "calibrate", "compare", "evaluate", "findings"}
    assert not [name for name in lacked for folder in ("", "arguments") if _holds(installed / "launch" / folder, name)]


def _holds(folder: Path, module: str) -> bool:
    place = folder / module.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def test_the_command_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """Presets, GPUs, prompt lists and weights come with the library."""
    shown = freespec_command(installed, tmp_path, "plan", "--config", "tiny-ltx", "--gpu", "a100")
    assert (shown.returncode, shown.stderr) == (0, "")
    words = ("--prompts", "configs/prompts/batch-demo.txt", "--methods", "direct", "--dry_run", "--out", "out")
    shown = freespec_command(installed, tmp_path, "batch", *words, "--model.device", "cpu")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert freespec_command(installed, tmp_path, "--version").stdout == f"{engine.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --runs .",
        "findings",
        "compare --prompt x --methods direct",
        "analyze --help",
        "calibrate --nproc 2",
        "batch --prompts vbench:overall_consistency --vbench . --out x",
    ],
)
def test_studies_need_a_checkout(installed: Path, tmp_path: Path, words: str) -> None:
    ended = freespec_command(installed, tmp_path, *words.split())
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: freespec {words.split(maxsplit=1)[0]} needs ")
    assert ended.stderr.endswith(f"use .venv/bin/python launch/{words.split(maxsplit=1)[0]}.py\n")
    assert ended.stderr.count("\n") == 1


def test_an_unknown_option_of_the_installed_command(installed: Path, tmp_path: Path) -> None:
    """Advice looks for the option in every command, some of which need a checkout."""
    ended = freespec_command(installed, tmp_path, "generate", "--prompt", "x", "--nonsense", "3")
    assert (ended.returncode, ended.stderr) == (2, "error: unknown setting nonsense; see --help\n")


def test_files_of_the_library_come_before_those_of_another_package(installed: Path, tmp_path: Path) -> None:
    """The folder of installed packages may have a configs/ of another package."""
    (installed / "configs").mkdir()
    try:
        shown = freespec_command(installed, tmp_path, "plan", "--gpu", "nothing")
    finally:
        (installed / "configs").rmdir()
    assert shown.stderr.startswith("error: unknown GPU 'nothing'; choose one of a100, h100, h200")


@pytest.mark.parametrize("name", ["generate", "plan"])
def test_a_script_shadows_no_module(name: str) -> None:
    """The folder of a script is first on the import path; no module may be found in it."""
    code = (
        f"import runpy, sys; from importlib.util import find_spec; sys.path[0] = {str(REPOSITORY / 'launch')!r}; "
        "assert find_spec('decode'); "
        f"runpy.run_path({str(REPOSITORY / 'launch' / f'{name}.py')!r}); assert find_spec('decode') is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_names_can_be_imported() -> None:
    assert {"LongVideoEngine", "RunConfig", "read_preset", "write_video"} <= set(engine.__all__)
    assert [name for name in engine.__all__ if not hasattr(engine, name)] == []
