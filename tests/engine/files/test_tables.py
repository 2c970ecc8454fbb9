"""Tables of the user's words: no cell is a formula, a column, a line or HTML of its own."""

import csv
import io
import math
from pathlib import Path

import pytest

from engine.files.tables import as_csv, markdown_cell, write_csv
from engine.files.whole import TakenError


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1", " =cmd|'/c calc'!A0", "＝1"])
def test_a_formula_is_text(text: str) -> None:
    [row] = csv.DictReader(io.StringIO(as_csv([{"prompt": text}]), newline=""))
    assert row == {"prompt": f"'{text}"}
    [row] = csv.DictReader(io.StringIO(as_csv([{text: "a"}]), newline=""))
    assert row == {f"'{text}": "a"}


def test_other_cells_stay_as_they_are() -> None:
    row = {"a": -1.5, "b": math.nan, "c": None, "d": 'it\'s "a", b', "e": -3, "f": "a = b", "g": math.inf}
    text = as_csv([row])
    assert text == 'a,b,c,d,e,f,g\n-1.5,,,"it\'s ""a"", b",-3,a = b,\n'
    assert as_csv([{"a": "x\ry\r\nz"}]) == 'a\n"x\ny\nz"\n'
    assert as_csv([], ["a", "b"]) == "a,b\n"
    assert as_csv([{"a": 1}], ["a", "b"]) == "a,b\n1,\n"


def test_file_is_written_atomically(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"a": "x"}])
    assert (tmp_path / "a.csv").read_bytes() == b"a\nx\n"
    with pytest.raises(TakenError):
        write_csv(tmp_path / "a.csv", [{"a": "y"}], replace=False)
    assert (tmp_path / "a.csv").read_bytes() == b"a\nx\n"


def test_a_cell_of_markdown_holds_its_text() -> None:
    assert markdown_cell("a|b\nc <script> & it's") == "a\\|b c &lt;script&gt; &amp; it's"
