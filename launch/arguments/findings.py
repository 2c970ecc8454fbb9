"""Command line of findings.py."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from engine.errors import UserError
from evaluation.study.parts import PLACES, Study, read_study
from launch.cli.parser import Keys, arrange, make_parser, parse

STUDY = "configs/study/findings.yaml"
USAGE = "[--study FILE] [--make PART,PART] [--SETTING VALUE ...]"
DESCRIPTION = "Make parts of a study, report on all existing parts, and write its page."


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The checked command line of findings.py."""

    study: Study
    make: list[str]
    overwrite: bool

    def place(self, name: str) -> Path:
        """Return one of the study's folders or files, by name."""
        return self.study.places[name]


def read(argv: list[str]) -> Arguments:
    """Parse and check; UserError for a mistake."""
    parser = make_parser("findings.py", USAGE, DESCRIPTION)
    add_arguments(parser)
    given = parse(parser, arrange(argv, Keys.of(parser)))
    study = read_study(given.study, {name: given[name] for name in (*PLACES, "device", "shards")})
    names = [word.strip() for word in given.make.split(",") if word.strip()]
    unknown = [name for name in names if name not in study.parts]
    if unknown:
        raise UserError(f"--make {unknown[0]} is not a part of the study: {', '.join(study.parts)}")
    asked = Arguments(study=study, make=names, overwrite=given.overwrite)
    if not names:
        _check_folders(asked)
    return asked


def _check_folders(asked: Arguments) -> None:
    """Raise UserError for a missing folder: a typo would replace the page with an empty one."""
    reported = any(part.is_made for part in asked.study.parts.values() if part.reports)
    for name in ("kept", "runs"):
        place = asked.place(name)
        if not place.is_dir() and not (name == "runs" and reported):
            raise UserError(f"--{name} {place} is not a folder; give the folder of `make findings`")


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--study", type=str, default=STUDY, help="YAML file of the study")
    parser.add_argument(
        "--make", type=str, default="", help="parts to make first, comma-separated, such as videos,steps"
    )
    parser.add_argument("--runs", type=str, help="folder of videos and reports, instead of the study's")
    parser.add_argument("--search", type=str, help="folder of the calibration, instead of the study's")
    parser.add_argument("--kept", type=str, help="folder of kept measures and reports, instead of the study's")
    parser.add_argument("--page", type=str, help="page to write, instead of the study's")
    parser.add_argument("--device", type=str, help="device to make videos on, instead of the study's")
    parser.add_argument("--shards", type=int, help="processes that share a comparison, instead of the study's")
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="replace a page even if it has more tables than the reports"
    )
