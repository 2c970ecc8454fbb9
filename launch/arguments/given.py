"""Options of given frames."""

from jsonargparse import ArgumentParser, Namespace

from engine.given.frames import GivenFrames, Shows, parse_given


def add_given(parser: ArgumentParser) -> None:
    """Add `--given`, `--extend` and `--extend_shows`."""
    parser.add_argument(
        "--given",
        type=str,
        action="append",
        default=[],
        help="a picture to show, WHERE=FILE; WHERE is first, last, seconds (2.5s) or a frame; may be repeated",
    )
    parser.add_argument("--extend", type=str, help="continue a video file, or saved latents")
    parser.add_argument(
        "--extend_shows",
        type=Shows,
        default="whole",
        help="content of the output: the whole video, or only the new part",
    )


def read_given(namespace: Namespace) -> GivenFrames | None:
    """The frames of these options; None if all are unset."""
    return parse_given(namespace.given, namespace.extend, namespace.extend_shows)
