"""A study: a YAML file of comparisons, an analysis and a calibration, made by the commands and reported on one page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from engine.config import ModelConfig
from engine.errors import UserError
from engine.files.trees import Shape, lacking, read_yaml
from engine.paths import REPOSITORY, expand, find_file

PLACES = ("runs", "search", "kept", "page")
PAGES = ("findings", "bench")
"""The pages of a study: the findings, or a section for each report of any name."""
_STUDY: Shape = {**dict.fromkeys((*PLACES, "device"), str), "shards": int, "make": dict}
_PART: Shape = {"command": str, "settings.out": str}
_OPTIONAL: Shape = {"reports": dict, "keep": list, "once": bool}
_COMMANDS = ("analyze", "calibrate", "compare")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command of a study.

    Attributes:
        name: name in the file.
        command: `compare`, `analyze` or `calibrate`.
        settings: its options, as words of a command line.
        reports: for each report on some of its videos, options that override `settings`.
        keep: files of its folder that are copied to `kept`/NAME.
        once: whether it is skipped if all of `keep` exist.
    """

    name: str
    command: str
    settings: Mapping[str, str]
    reports: Mapping[str, Mapping[str, str]]
    keep: Sequence[str]
    once: bool

    @property
    def is_made(self) -> bool:
        """Whether there are kept measures or a comparison's folder to report on."""
        files = [self.settings.get("measures"), f"{self.settings['out']}/batch.json"]
        return any(expand(file).exists() for file in files if file is not None)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The parts of a study by name, its folders, and which of `PAGES` it writes."""

    writes: str
    places: Mapping[str, Path]
    shards: int
    parts: Mapping[str, Part]

    @property
    def report_names(self) -> list[str]:
        """The names of all reports, made or not."""
        return [name for part in self.parts.values() for name in part.reports]

    def reports(self) -> Iterator[list[str]]:
        """Yield the command line of compare.py for each report that can be made."""
        for part in self.parts.values():
            for name, changed in part.reports.items() if part.is_made else ():
                settings = {**part.settings, **changed, "report": str(self.places["runs"] / name)}
                yield [*words(settings), "--report_only", "--report_if_any"]


def read_study(path: str, own: Mapping[str, Any]) -> Study:
    """Read a study from a YAML file; non-None values of `own` override its places, device and shards."""
    file = find_file(path)
    tree = read_yaml(file, name=f"--study {path}", remedy="configs/study/findings.yaml is an example")
    tree |= {key: value for key, value in own.items() if value is not None}
    if (wrong := lacking(tree, _STUDY)) is not None:
        raise UserError(f"--study {path} is not a study ({wrong}); configs/study/findings.yaml is an example")
    # Otherwise every process of every part would refuse it.
    if tree["device"] not in (devices := get_args(get_type_hints(ModelConfig)["device"])):
        raise UserError(f"device must be {', '.join(devices[:-1])} or {devices[-1]}, got {tree['device']!r}")
    if tree["shards"] < 1:
        raise UserError(f"shards must be 1 or more, got {tree['shards']}")
    if (writes := tree.get("writes", PAGES[0])) not in PAGES:
        raise UserError(f"--study {path}: writes must be {' or '.join(PAGES)}, got {writes!r}")
    places = {name: _there(tree[name]) for name in PLACES}
    parts = {name: _part(path, name, part, places, tree["device"]) for name, part in tree["make"].items()}
    return Study(writes=writes, places=places, shards=tree["shards"], parts=parts)


def words(settings: Mapping[str, str]) -> list[str]:
    """Convert settings to a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def _there(place: str) -> Path:
    """Resolve a path from the working directory, or from the checkout if it exists only there."""
    own, shipped = expand(place), REPOSITORY / place
    return shipped if shipped.exists() and not own.exists() else own


def _part(path: str, name: str, tree: Any, places: Mapping[str, Path], device: str) -> Part:
    known = {"command", "settings", *_OPTIONAL}
    wrong = lacking(tree, _PART) or lacking(tree, {key: _OPTIONAL[key] for key in _OPTIONAL.keys() & tree.keys()})
    if wrong is None and tree["command"] not in _COMMANDS:
        wrong = f"command is {tree['command']}, not one of {', '.join(_COMMANDS)}"
    if wrong is None and (unknown := sorted(tree.keys() - known)):
        wrong = f"unknown key {unknown[0]}"
    if wrong is not None:
        raise UserError(f"--study {path}, {name}: {wrong}; configs/study/findings.yaml is an example")
    return Part(
        name=name,
        command=tree["command"],
        settings={"model.device": device, **_as_words(tree["settings"], places)},
        reports={report: _as_words(changed, places) for report, changed in tree.get("reports", {}).items()},
        keep=tree.get("keep", []),
        once=tree.get("once", False),
    )


def _as_words(settings: Mapping[str, Any], places: Mapping[str, Path]) -> dict[str, str]:
    """Convert values to words: nested lists are joined by commas, and `{kept}` is replaced by a path."""

    def word(value: Any) -> str:
        if isinstance(value, list):
            return ",".join(map(word, value))
        text = str(value)
        for name, place in places.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text

    return {key: word(value) for key, value in settings.items()}
