"""The lists of prompts: held out, disjoint in what they combine, and as the script writes them."""

from pathlib import Path

from tiny.captions import parse_caption
from tiny.prompts import CALIBRATION, REPORT, write_lists
from tiny.world import MOTIONS, is_held_out

FOLDER = Path(__file__).parent.parent.parent / "configs" / "prompts"


def combinations(name: str) -> list[tuple[str, str, str]]:
    told = [parse_caption(line) for line in (FOLDER / name).read_text().splitlines()]
    assert None not in told
    return [(each.shape, each.colour, each.motion) for each in told]


def test_the_lists_are_held_out_and_share_no_combination() -> None:
    report, calibration = combinations(REPORT), combinations(CALIBRATION)
    assert (len(report), len(calibration)) == (40, 20)
    assert all(is_held_out(*each) for each in report + calibration)
    assert not set(report) & set(calibration)
    for each in (report, calibration):
        assert {motion for _, _, motion in each[: len(MOTIONS)]} == set(MOTIONS)


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    write_lists(tmp_path)
    for name in (REPORT, CALIBRATION):
        text = (FOLDER / name).read_text()
        assert (tmp_path / name).read_text() == text
        assert len(set(text.splitlines())) == len(text.splitlines())
