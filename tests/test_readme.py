"""What README.md and docs/ tell a reader: commands parse, Python compiles and runs, links lead somewhere."""

import argparse
import ast
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest

import engine
from engine.config import RunConfig
from engine.media.read_video import read_video
from launch.cli.parser import Keys, make_parser

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "tiny").rglob("*.md"))]
OURS = ("python", "torchrun", "make", "pip")
OTHERS = ("#", ".", "~", "export", "for", "git", "wget", "ln", "mkdir", "ffprobe", "sha256sum", "srun", "ray", "docker")

NO_SETTINGS = ("parallel.nodes", "parallel.why", "model.resident_bytes", "decode.py", "help_all", "distribution")
"""Fields of a record, a script, and flags of every command or of others' commands."""


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.S | re.M)


def shell_lines() -> list[tuple[str, str]]:
    """(page, line) of every line to type, in fences, blocks of four spaces and backquotes; continuation lines are joined."""
    found = []
    for page in PAGES:
        indented = re.findall(r"^ {4}((?:[A-Z_]+=\S+ )*(?:python|torchrun|make|pip) .*(?:\n {8}.*)*)", read(page), re.M)
        inline = re.findall(r"(?<!`)`((?:python|torchrun|make) [^`\n]+)`", read(page))
        for block in [*fenced(page, "bash"), *indented, *inline]:
            lines = re.sub(r" *\\\n *", " ", block).splitlines()
            found += [(page.name, line) for line in lines if line.strip()]
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command of ours, without variables before it, what follows && and comments."""
    found = []
    for page, line in shell_lines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["ray"] and "--" in words:
            words = words[words.index("--") + 1 :]
        if words and Path(words[0]).name in OURS:
            end = next(
                (i for i, word in enumerate(words) if word in ("&&", "&", ";") or word.endswith(";")), len(words)
            )
            found.append((page, words[:end]))
    return found


ALL = sorted({shlex.join(words) for _, words in commands()})


def starting(*names: str) -> list[str]:
    return [command for command in ALL if shlex.split(command)[0] in names]


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 40
    assert {"README.md", "CONTRIBUTING.md", "compare.md", "parallel.md", "reliability.md"} <= {
        page for page, _ in commands()
    }


def test_every_line_begins_with_a_known_program() -> None:
    """A typo such as `pyhton` would otherwise not be checked."""
    lines = [re.sub(r"^(?:[A-Z_]+=\S+ )*", "", line).strip() for page, line in shell_lines() if page != "vbench.md"]
    assert [line for line in lines if not line.startswith((*OURS, *OTHERS))] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that has what readers have by then: our files, and folders that earlier commands left."""
    for name in ("configs", "tiny", "docs", "benchmarks", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("batch", "compare", "findings", "analysis", "calibration", "batch-demo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "blend.py").write_text(fenced(ROOT / "docs/adding-a-method.md", "python")[0])
    monkeypatch.delitem(sys.modules, "blend", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class ParsedError(Exception):
    """Ends a command once its arguments are parsed."""


def parse_and_end(parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
    parser.parse_known_args(*given)
    unknown = parser.parse_known_args(*given)[1]
    assert unknown == []
    raise ParsedError


@pytest.mark.parametrize("command", starting("python", "torchrun"))
def test_commands_parse(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of torchrun and of the command, with its checks of values; `...` stands for what a reader adds."""
    program, *words = drop_dots(shlex.split(command))
    if program == "torchrun":
        from torch.distributed.run import get_args_parser  # noqa: PLC0415

        options = get_args_parser().parse_args(words)
        words = [options.training_script, *options.training_script_args]
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif words[0] == "-m":
        module = import_module(words[1])
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", words[1:])
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
            if words[2:] or "parse_args" in read(Path(str(module.__file__))):
                with pytest.raises(ParsedError):
                    module.main()
    elif words[0].startswith("launch/"):
        read_launch(Path(words[0]).stem, words[1:], folder)
    else:
        assert (ROOT / words[0]).is_file()


def drop_dots(words: list[str]) -> list[str]:
    """Without the `...` that stands for more options; one that stands for a prompt stays."""
    return [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before == "--prompt"]


def read_launch(name: str, words: list[str], folder: Path) -> None:
    """Read the arguments as the command does, with the files that they name; VBench's own prompts are not here."""
    for flag, value in itertools.pairwise(["", *words]):
        if flag in ("--given", "--extend", "--videos") or value.startswith("@") or (name == "decode" and not flag):
            (folder / value.removeprefix("@").rpartition("=")[2]).write_text("blurred\n")
        if flag == "--runs":
            for run in value.split(","):
                (folder / run).mkdir(parents=True, exist_ok=True)
    if any(word.startswith("vbench:") for word in words):
        at = words.index("--vbench")
        words = [*words[:at], *words[at + 2 :]]
        words = ["configs/prompts/batch-demo.txt" if word.startswith("vbench:") else word for word in words]
    import_module(f"launch.arguments.{name}").read(words)


@pytest.mark.parametrize("wrong", ["--promt x", "--video.num_frames 34x", "--nproc two", "--config configs/none.yaml"])
def test_negative_control_wrong_command(wrong: str, folder: Path) -> None:
    """The negative control."""
    with pytest.raises(engine.UserError):
        read_launch("generate", shlex.split(wrong), folder)


@pytest.mark.parametrize("command", starting("make", "pip"))
def test_targets_and_extras_exist(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        targets = {word for line in re.findall(r"^([\w -]+):", read(ROOT / "Makefile"), re.M) for word in line.split()}
        variables = set(re.findall(r"\$\(([A-Z_]+)\)", read(ROOT / "Makefile")))  # those that it reads
        assert [
            word for word in words if word not in targets and word.partition("=")[0] not in variables and word != "..."
        ] == []
    else:
        extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
        assert [name for word in words for name in re.findall(r"^\.\[(\w+)\]", word) if name not in extras] == []


SMALL_RUNS = re.findall(r"launch/(\w+)\.py *(.*?)(?:\$\(ARGS\))?$", read(ROOT / "Makefile"), re.M)


@pytest.mark.parametrize(("name", "words"), SMALL_RUNS)
def test_commands_of_the_makefile_parse(name: str, words: str, folder: Path) -> None:
    """With the presets that they name."""
    read_launch(name, words.split(), folder)


def test_every_small_preset_is_run() -> None:
    named = {word for _, words in SMALL_RUNS for word in words.split() if word.startswith("configs/small/")}
    assert named == {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs/small").iterdir()}


PYTHON = [(page.name, block) for page in PAGES for block in fenced(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_compiles_and_its_imports_exist(page: str, block: str) -> None:
    """Examples in README and adding-a-method.md run in tests of their own; others need weights, or packages that they name."""
    tree = ast.parse(block, page)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if page == "adding-a-method.md":  # the file that it imports is the page's own
        imports = [node for node in imports if getattr(node, "module", None) != "blend"]
    if "# pip install" not in block:
        exec(compile(ast.Module(imports, []), page, "exec"), {})


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = [block for block in fenced(ROOT / "README.md", "python") if "read_preset" in block]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert [len(list(read_video(tmp_path / f"circle-{seed}.mp4"))) for seed in (0, 1)] == [65, 65]


def test_the_picture_shows_the_chosen_case() -> None:
    found = runpy.run_path(str(ROOT / "docs/figures/methods.py"))
    prompt, _ = found["choose"]()
    assert f'"{prompt}"' in read(ROOT / "README.md")


def test_names_that_the_engine_exports() -> None:
    assert [name for name in engine.__all__ if getattr(engine, name).__name__ != name] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_paths_in_code_exist() -> None:
    """`folder/file.py` and the like between backquotes."""
    rooms = "launch|engine|parallel|freespec|tests|configs|benchmarks|evaluation|metrics|tiny|docs|deploy|integrations"
    pattern = re.compile(rf"`((?:{rooms})/[\w./-]*(?:/|\.py|\.yaml|\.md|\.txt|\.json|\.jsonl))`")
    told = {(page.name, path) for page in PAGES for path in pattern.findall(read(page))}
    assert len(told) > 20
    assert sorted((page, path) for page, path in told if not (ROOT / path).exists()) == []


def test_structure_has_a_line_for_each_room() -> None:
    text = read(ROOT / "docs/structure.md")
    tops = ("launch", "engine", "parallel", "freespec", "evaluation", "metrics", "tiny", "benchmarks")
    rooms = [file.parent.relative_to(ROOT) for top in tops for file in (ROOT / top).rglob("__init__.py")]
    assert [str(room) for room in rooms if f"`{room.as_posix()}/`" not in text] == []


def test_pages_are_short() -> None:
    """README has at most 900 words, a page 1,500, the generated findings 6,600; CHANGELOG.md grows with each release."""
    counts = {page: len(re.sub(r"[|]|---", " ", read(page)).split()) for page in PAGES if page.name != "CHANGELOG.md"}
    limits = dict.fromkeys(counts, 1500) | {ROOT / "README.md": 900, ROOT / "docs/findings.md": 6600}
    assert {str(page): count for page, count in counts.items() if count > limits[page]} == {}


def test_settings_and_flags_in_code_exist() -> None:
    """`group.setting` and `--flag` between backquotes are those of a command."""
    keys = [
        keys_of(name)
        for name in (
            "generate",
            "batch",
            "serve",
            "compare",
            "analyze",
            "calibrate",
            "plan",
            "decode",
            "previews",
            "evaluate",
            "findings",
        )
    ]
    groups = {leaf.partition(".")[0] for each in keys for leaf in each.leaves if "." in leaf}
    wrong = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # names those that are gone, too
            continue
        text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
        told = re.findall(rf"`(?:--)?((?:{'|'.join(groups)})\.[a-z_.]+[a-z])(?:[ =][^`]*)?`", text)
        told += re.findall(r"`--([a-z_.]+[a-z])(?:[ =][^`]*)?`", text)
        wrong += [
            (page.name, key) for key in told if key not in NO_SETTINGS and not any(each.knows(key) for each in keys)
        ]
    assert wrong == []


def keys_of(name: str) -> Keys:
    parser = make_parser(name, "", "")
    import_module(f"launch.arguments.{name}").add_arguments(parser)
    if name not in ("decode", "evaluate", "findings"):  # they have no settings of a run
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(RunConfig, nested_key=None)
    return Keys.of(parser)
