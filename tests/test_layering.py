"""Imports point one way: what each folder may import."""

import ast
from collections.abc import Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"freespec", "parallel", "engine", "launch", "evaluation", "metrics", "tiny", "benchmarks", "tests"}
MODELS = {"diffusers", "transformers"}
FORBIDDEN = {
    "freespec": OURS - {"freespec"} | MODELS | {"torch.distributed"},
    "parallel": OURS - {"parallel"} | MODELS,
    "engine": OURS - {"engine", "parallel", "freespec"},
    "launch": OURS - {"launch", "engine", "parallel", "evaluation", "metrics"} | MODELS,
    # Files and processes only: VBench has its own environment, and nothing here loads a model.
    "evaluation": OURS - {"evaluation", "engine", "metrics"}
    | MODELS
    | {"torch", "engine.engine", "engine.load.pipeline"},
    "metrics": OURS - {"metrics", "tiny"} | MODELS,  # of tiny, only what reads its world
    "tiny": OURS - {"tiny"},
}


def wrong_imports(floor: str, source: str) -> set[str]:
    """Forbidden modules that a source of this floor imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {bad for bad in FORBIDDEN[floor] for name in names if f"{name}.".startswith(f"{bad}.")}


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_imports_point_one_way(floor: str) -> None:
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    assert {str(path): bad for path in files if (bad := wrong_imports(floor, path.read_text()))} == {}


@pytest.mark.parametrize(
    ("floor", "source", "bad"),
    [
        ("freespec", "from torch import distributed", "torch.distributed"),
        ("freespec", "import torch.distributed as dist", "torch.distributed"),
        ("freespec", "def f():\n    from engine import config", "engine"),
        ("parallel", "import freespec.windows", "freespec"),
        ("parallel", "from diffusers import WanPipeline", "diffusers"),
        ("engine", "import launch", "launch"),
        ("launch", "from freespec.methods import METHODS", "freespec"),
        ("launch", "import diffusers", "diffusers"),
        ("evaluation", "import torch.nn", "torch"),
        ("evaluation", "from engine.engine import LongVideoEngine", "engine.engine"),
        ("metrics", "import diffusers", "diffusers"),
        ("metrics", "from engine.media.write_video import read_video", "engine"),
        ("tiny", "from engine.errors import UserError", "engine"),
    ],
)
def test_negative_control(floor: str, source: str, bad: str) -> None:
    assert wrong_imports(floor, source) == {bad}
    harmless = "import enginery, json" if floor == "evaluation" else "import torch, enginery, torch.nn.functional"
    assert wrong_imports(floor, harmless) == set()


def bound(source: str) -> set[str]:
    """Names that a module binds anywhere, and the strings in it, such as those of a lazy package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name():
                names.add(node.id)
            case ast.alias():
                names.add(node.asname or node.name)
            case ast.Constant(value=str()):
                names.add(node.value)
    return names


def unknown_imports(source: str, modules: Mapping[str, Set[str]]) -> set[str]:
    """Imports from the project's packages of a module or a name that is not there; `modules` are names by module."""
    unknown = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            unknown |= {alias.name for alias in node.names} - modules.keys()
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            names = {alias.name for alias in node.names}
            found = modules.get(module, set()) | {name for name in names if f"{module}.{name}" in modules}
            unknown |= {f"{module}.{name}" for name in names - found}
    return {name for name in unknown if name.partition(".")[0] in OURS}


def test_every_import_of_the_project_s_exists() -> None:
    sources = {module_name(path): path.read_text() for floor in OURS for path in (ROOT / floor).rglob("*.py")}
    modules = {name: bound(text) for name, text in sources.items()}
    assert {name: bad for name, text in sources.items() if (bad := unknown_imports(text, modules))} == {}


def test_negative_control_unknown_module_or_name() -> None:
    source = "from engine.nowhere import a\nimport engine.errors, torch\nfrom engine.errors import UserError, b\nfrom engine import errors"
    modules = {"engine": set(), "engine.errors": {"UserError"}}
    assert unknown_imports(source, modules) == {"engine.nowhere.a", "engine.errors.b"}


def imported(source: str, modules: Set[str]) -> set[str]:
    """The modules among these that a source imports, at any depth of the code and under TYPE_CHECKING too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            names |= inner or {str(node.module)}
    return names & modules


def find_cycles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of modules that import one another in a circle."""
    arrows = {name: imported(source, sources.keys()) for name, source in sources.items()}
    return [sorted(group) for group in strongly_connected(arrows) if len(group) > 1 or group <= arrows[min(group)]]


def strongly_connected(arrows: Mapping[str, Set[str]]) -> list[set[str]]:
    """Groups of nodes that reach one another."""
    reached = {name: {name} | arrows[name] for name in arrows}
    grown = True
    while grown:
        wider = {name: set().union(*(reached[other] for other in found)) for name, found in reached.items()}
        reached, grown = wider, wider != reached
    groups = {frozenset(other for other in found if name in reached[other]) for name, found in reached.items()}
    return [set(group) for group in groups]


def module_name(path: Path) -> str:
    """The name that a source file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_modules_import_one_another_in_a_circle() -> None:
    files = [path for floor in sorted(OURS - {"tests"}) for path in (ROOT / floor).rglob("*.py")]
    assert find_cycles({module_name(path): path.read_text() for path in files}) == []


def test_negative_control_import_cycle() -> None:
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine import record\n"
    sources = {"engine.engine": "import engine.loop", "engine.loop": hidden, "engine.record": "import engine.engine"}
    assert find_cycles(sources) == [["engine.engine", "engine.loop", "engine.record"]]
    assert find_cycles(sources | {"engine.loop": "from engine import errors"}) == []


def find_room_cycles(sources: Mapping[str, str]) -> list[list[str]]:
    """Groups of rooms, the sub-packages of a floor, whose modules import one another's."""
    packages = {name.rpartition(".")[0] for name in sources}
    rooms = {name: found for name in sources if (found := ".".join(name.split(".")[:2])) in packages and found != name}
    rooms |= {room: room for room in set(rooms.values())}
    arrows: dict[str, set[str]] = {room: set() for room in rooms.values()}
    for name, room in rooms.items():
        arrows[room] |= {rooms[other] for other in imported(sources.get(name, ""), rooms.keys())} - {room}
    return [sorted(group) for group in strongly_connected(arrows) if len(group) > 1]


def test_no_rooms_import_one_another_in_a_circle() -> None:
    files = [path for floor in sorted(OURS - {"tests"}) for path in (ROOT / floor).rglob("*.py")]
    assert find_room_cycles({module_name(path): path.read_text() for path in files}) == []


def test_negative_control_room_cycle() -> None:
    sources = {"launch.cli.a": "import launch.ranks.b", "launch.ranks.b": "import launch.errors"}
    sources |= {"launch.ranks.c": "from launch.cli import d", "launch.cli.d": "", "launch.errors": ""}
    assert find_cycles(sources) == []
    assert find_room_cycles(sources) == [["launch.cli", "launch.ranks"]]
    assert find_room_cycles(sources | {"launch.ranks.c": "from launch import errors"}) == []
