"""The report's words: tables that stay tables, what is missing said, and the paper's figures as it has them."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evaluation.scoring.measures import WORLD, Measures
from evaluation.scoring.report import Evaluation, as_markdown, as_tree, read_paper, table_of_videos, write_report
from evaluation.scoring.tables import Scored
from evaluation.vbench.dimensions import DIMENSIONS
from evaluation.vbench.parse import DimensionScores
from evaluation.videos import Video, groups, read_batch


@pytest.fixture
def evaluation(batch: Path) -> Evaluation:
    """Six prompts with one dimension each, better by 0.1 in the second method; proxies off."""
    rows = []
    for label, group in groups(read_batch(batch)).items():
        for number in range(6):
            video = replace(group[0], prompt=f"prompt | {number}", prompt_id=f"p{number:04d}")
            better = 0.1 + number / 1000 if label == "sliding_window" else 0.0
            rows.append(Scored(label=label, video=video, values={"dynamic_degree": 0.1 * number + better}))
    scores = DimensionScores(dimension="dynamic_degree", headline=0.25, videos={"p0000-0": 0.5})
    return Evaluation(
        title="Evaluation of runs",
        rows=rows,
        baseline="direct",
        dimensions=("dynamic_degree",),
        scores={("direct", "dynamic_degree"): scores},
        vbench={"commit": "45e79ec", "sources": "abc", "versions": {"torch": "2.5.1", "av": None}},
    )


def tables(text: str) -> list[list[str]]:
    """Every Markdown table, as its lines."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_every_table_has_as_many_cells_in_each_row(evaluation: Evaluation) -> None:
    text = as_markdown(evaluation, as_tree(evaluation))
    for table in tables(text):
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1, table


def test_a_difference_is_marked_where_its_interval_leaves_out_zero(evaluation: Evaluation) -> None:
    tree = as_tree(evaluation)
    found = tree["differences"]["sliding_window"]["dynamic_degree"]
    assert found["mean"] == pytest.approx(0.1025)
    assert 0.1 < found["low"] < found["high"] < 0.105
    text = as_markdown(evaluation, tree)
    assert "**+0.1025 [+0.10" in text
    same = replace(
        evaluation, rows=[replace(r, values={"dynamic_degree": r.video.seed + 0.5}) for r in evaluation.rows]
    )
    assert "*" not in as_markdown(same, as_tree(same)).partition("leaves out 0:")[2].partition("VBench's own")[0]


def test_upstreams_headline_stands_apart(evaluation: Evaluation) -> None:
    tree = as_tree(evaluation)
    assert tree["headlines"]["direct"]["dynamic_degree"] == {"score_upstream": 0.25, "score_video_mean": 0.5}
    assert tree["means"]["direct"]["dynamic_degree"]["mean"] == pytest.approx(0.25)


def test_there_is_no_total_anywhere(evaluation: Evaluation) -> None:
    tree = as_tree(evaluation)
    assert tree["total"] is None
    text = as_markdown(evaluation, tree)
    assert text.count("total") == text.count("There is no total: VBench's total") * 2
    assert "total" not in table_of_videos(tree)


def test_few_prompts_have_no_interval(evaluation: Evaluation) -> None:
    few = replace(evaluation, rows=[row for row in evaluation.rows if row.video.prompt_id < "p0002"])
    assert "0.0500 (2 prompts)" in as_markdown(few, as_tree(few))


def test_different_lengths_and_lists_are_reported(evaluation: Evaluation) -> None:
    assert as_tree(evaluation)["notes"] == []
    longer = [replace(r, video=replace(r.video, num_frames=99)) if r.label == "direct" else r for r in evaluation.rows]
    assert "Videos differ in length, size or rate" in as_tree(replace(evaluation, rows=longer))["notes"][0]
    assert (
        "direct 5, sliding_window 6; 5 in common" in as_tree(replace(evaluation, rows=evaluation.rows[1:]))["notes"][0]
    )


def test_files_are_written_whole(evaluation: Evaluation, tmp_path: Path) -> None:
    paths = write_report(evaluation, tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.json", "report.md"]


def papers_rows(text: str, table: str) -> list[list[str]]:
    """The cells of one of the paper's tables."""
    part = text.partition(f"### {table}:")[2].partition("###")[0].partition("##")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("|")][2:]


def ablation(evaluation: Evaluation, model: str) -> Evaluation:
    """The videos as if two rows of the ablation had made them with this model: the published method, and GB."""
    switches = {"direct": ("local", True, True, "time"), "sliding_window": ("global", False, False, "none")}
    rows = []
    for row in evaluation.rows:
        settings = tuple(zip(("basis", "rank", "time", "residual"), switches[row.label], strict=True))
        video = replace(row.video, method="freespec", model=model, settings=(("alpha", 5.0), *settings))
        rows.append(replace(row, label="whole" if row.label == "direct" else "gb", video=video))
    return replace(evaluation, rows=rows, baseline="whole", scores={})


def test_rows_of_the_ablation_stand_beside_the_papers(evaluation: Evaluation) -> None:
    made = ablation(evaluation, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    tree = as_tree(made)
    text = as_markdown(made, tree)
    rows = papers_rows(text, "Table 3")
    assert [row[0] for row in rows] == [
        *("GB (paper)", "gb (here)", "LB + fixed fusion (paper)", "LB + fixed fusion (here)"),
        *("LB + RA (paper)", "LB + RA (here)", "LB + TA (paper)", "LB + TA (here)"),
        *("LB + RA + TA (paper)", "LB + RA + TA (here)", "LB + RA + TA + F-GR (paper)", "LB + RA + TA + F-GR (here)"),
        *("LB + RA + TA + T-GR (paper)", "whole (here)"),
    ]
    assert rows[1][4] == f"{tree['means']['gb']['dynamic_degree']['mean']:.4f}"
    assert rows[-1][4] == f"{tree['means']['whole']['dynamic_degree']['mean']:.4f}"
    assert rows[3][1:] == ["not made"] * 6
    # The method of Table 1 is the published one, not every row of its ablation.
    assert [row[0] for row in papers_rows(text, "Table 1")][-2:] == ["FreeSpec (paper)", "whole (here)"]
    other = ablation(evaluation, "tiny/wan")
    assert "(here)" not in as_markdown(other, as_tree(other))


def test_rows_of_the_ablation_are_those_of_its_presets() -> None:
    """Each row has the switches of its file in configs/ablation, and no two rows have the same."""
    table = read_paper()["tables"][2]
    presets = [
        yaml.safe_load(path.read_text())
        for path in sorted((Path(__file__).parents[3] / "configs/ablation").glob("*.yaml"))
    ]
    found = [row["settings"] for row in table["rows"]]
    assert sorted(map(str, found)) == sorted(str(preset["method"]["freespec"]) for preset in presets)
    assert len(set(map(str, found))) == 7


def test_exact_measures_are_a_table_or_the_reason_why_not(evaluation: Evaluation) -> None:
    values = dict.fromkeys(WORLD, 0.25)
    rows = [replace(row, values={**row.values, **values}) for row in evaluation.rows]
    measured = Measures(values={}, events=False, not_world=None, not_long="short", notes=[])
    made = replace(evaluation, rows=rows, measured=measured)
    tree = as_tree(made)
    assert tree["measures"][-len(WORLD) :] == list(WORLD)
    text = as_markdown(made, tree).partition("## Exact measures of the embedded world")[2]
    assert "| `world.shape_kept`, share of frames | 0.2500 [0.2500, 0.2500] | 0.2500 [0.2500, 0.2500] |" in text
    assert text.count("| `world.") == 2 * len(WORLD)  # means and differences
    none = replace(evaluation, measured=replace(measured, not_world="frames of the world are 64 x 64"))
    tree = as_tree(none)
    assert not set(WORLD) & set(tree["measures"])
    assert "Not available: frames of the world are 64 x 64." in as_markdown(none, tree)


def test_the_papers_figures() -> None:
    """Sums of each table, added up from the paper's text: a digit that was mistyped shows."""
    paper = read_paper()
    assert tuple(paper["columns"]) == DIMENSIONS
    assert [table["name"] for table in paper["tables"]] == ["Table 1", "Table 2", "Table 3"]
    sums = [
        [round(sum(column), 4) for column in zip(*(row["values"] for row in table["rows"]), strict=True)]
        for table in paper["tables"]
    ]
    assert sums == SUMS
    # Dynamic degrees are counts of clips: 100 prompts x 2 halves x 11 clips, 100 x 9, 50 x 11.
    for table, clips in zip(paper["tables"], (2200, 900, 550), strict=True):
        for row in table["rows"]:
            count = row["values"][3] * clips
            assert abs(count - round(count)) <= 0.5e-4 * clips + 1e-9, row["name"]


SUMS = [
    [5.9002, 5.8306, 5.9221, 1.4709, 3.6116, 3.8471],
    [5.7834, 5.787, 5.8909, 0.97, 3.2467, 3.847],
    [6.8908, 6.8063, 6.9282, 2.4837, 4.3295, 4.5278],
]


def test_videos_of_a_report_are_complete(evaluation: Evaluation) -> None:
    first: dict = as_tree(evaluation)["videos"][0]
    assert isinstance(evaluation.rows[0].video, Video)
    assert {
        "label",
        "method",
        "config_id",
        "prompt_id",
        "prompt",
        "seed",
        "path",
        "sha256",
        "num_frames",
        "fps",
    } <= set(first)
