"""The table and the plot of a trace."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from engine.spectra.plot import draw_trace, rank_grid, write_trace


def two_steps() -> list[dict]:
    """Rows of a run of two layers: one dual step, one local."""
    dual = {"weight_first": 1.0, "weight_last": 0.05, "residual": 0.2}
    rows = [
        {"step": 0, "layer": layer, "branch": branch, "effective_rank": 5.0 + layer + number, **dual}
        for layer in range(2)
        for number, branch in enumerate(("local", "global"))
    ]
    return rows + [{"step": 1, "layer": layer, "branch": "local", "effective_rank": 3.0} for layer in range(2)]


def test_the_grid_has_each_rank_in_its_place_and_nan_where_nothing_was_computed() -> None:
    assert np.array_equal(rank_grid(two_steps(), "local"), [[5.0, 3.0], [6.0, 3.0]])
    assert np.array_equal(rank_grid(two_steps(), "global"), [[6.0, np.nan], [7.0, np.nan]], equal_nan=True)


def test_the_table_holds_every_row(tmp_path: Path) -> None:
    write_trace(two_steps(), tmp_path / "a.trace.csv", tmp_path / "a.trace.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace.csv", "a.trace.png"]
    with (tmp_path / "a.trace.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert (rows[1]["branch"], float(rows[1]["effective_rank"]), float(rows[1]["residual"])) == ("global", 6.0, 0.2)
    assert (rows[5]["step"], rows[5]["residual"]) == ("1", "")
    with Image.open(tmp_path / "a.trace.png") as picture:
        assert picture.width == 1200


def test_a_run_of_one_branch_is_drawn_and_says_what_is_missing() -> None:
    rows = [{"step": step, "layer": 0, "branch": "global", "effective_rank": 4.0} for step in range(3)]
    words = {text.get_text() for axes in draw_trace(rows).axes for text in axes.texts}
    assert words == {"not computed in this run", "no step of this run fused the branches"}
    assert {text.get_text() for axes in draw_trace(two_steps()).axes for text in axes.texts} == set()
