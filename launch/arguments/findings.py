"""Command line of findings.py."""

from jsonargparse import ArgumentParser, Namespace

from engine.errors import UserError
from engine.paths import REPOSITORY, expand
from launch.cli.parser import Keys, arrange, make_parser, parse

USAGE = "findings.py [--runs FOLDER] [--kept FOLDER] [--page FILE] [--overwrite]"
DESCRIPTION = "Write the page of findings from the reports that `make findings` and launch/calibrate.py left."


def read(argv: list[str]) -> Namespace:
    """Parse and check; UserError for a mistake."""
    parser = make_parser("findings.py", USAGE, DESCRIPTION)
    add_arguments(parser)
    given = parse(parser, arrange(argv, Keys.of(parser)))
    for name in ("runs", "kept"):
        if not expand(given[name]).is_dir():  # of a mistyped folder the page would have nothing, over one of everything
            raise UserError(f"--{name} {given[name]} is no folder; name the one of `make findings`")
    return given


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--runs", type=str, default="runs/findings", help="folder with methods/, noise/, ablation/ and steps/"
    )
    parser.add_argument(
        "--kept",
        type=str,
        default=str(REPOSITORY / "docs" / "findings"),
        help="folder of what outlives the videos: their measures, and in analysis/ and calibration/ the reports of these",
    )
    parser.add_argument("--page", type=str, default=str(REPOSITORY / "docs" / "findings.md"), help="the page to write")
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="replace a page that has tables of more than the reports hold"
    )
