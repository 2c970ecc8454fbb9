"""Write the report of an evaluation, with the paper's tables: JSON, Markdown, and CSV with a line per video and measure."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.files.tables import as_csv, markdown_cell, markdown_table
from engine.files.trees import finite_or_none
from engine.files.whole import write_json, write_text
from evaluation.markdown import difference, estimate
from evaluation.scoring.measures import COURSE, EVENTS, WORLD, Measures
from evaluation.scoring.tables import Scored, differences, means
from evaluation.vbench.dimensions import DIMENSIONS
from evaluation.vbench.parse import DimensionScores
from evaluation.videos import as_json
from metrics.bootstrap import MIN_COUNT, Estimate
from metrics.course import READING
from metrics.proxies import PROXIES

PAPER = Path(__file__).with_name("paper.json")
NO_TOTAL = (
    "There is no total: VBench's total is a weighted sum of sixteen dimensions, "
    "and its own script counts missing ones as 0."
)
MISSING = "not available"
_NOT_ASKED = "not asked for"
_DECIMALS = 4  # as the paper
# First sentences of sections, by heading.
_WORLD, _EVENTS, _COURSE = "Exact measures of the embedded world", "Events of timelines", "The course of long videos"
_ABOUT = {
    _WORLD: "The world's shapes, colours, places and speeds, read from every frame; docs/compare.md says what each measure is. They are "
    "exact on rendered clips; they ignore whatever else a video shows.",
    _EVENTS: "Whether frames show the event that they are for, read as above; docs/compare.md says what each measure is.",
    _COURSE: f"None has a good direction of its own: {READING}; docs/long-videos.md has what each finds on clips whose truth is known.",
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The contents of a report.

    Attributes:
        title: what was evaluated.
        rows: every video with its values, dimensions and proxies.
        baseline: the label to compare others with.
        dimensions: the requested dimensions.
        measured: which measures without networks there are; None if they were not asked for.
        scores: VBench-Long's scores by (label, dimension).
        vbench: commit and versions; None without VBench.
        notes: notes for the reader.
        failures: one line for each missing result of VBench.
        missing: one line for each folder with missing videos.
    """

    title: str
    rows: Sequence[Scored]
    baseline: str
    dimensions: Sequence[str] = ()
    measured: Measures | None = None
    scores: Mapping[tuple[str, str], DimensionScores] = field(default_factory=dict)
    vbench: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()
    missing: Sequence[str] = ()

    @property
    def labels(self) -> list[str]:
        """Methods, in the paper's order, others after them by name."""
        known = [row["method"] for row in read_paper()["tables"][0]["rows"]]
        found = sorted({row.label for row in self.rows})
        return sorted(found, key=lambda label: (known.index(label) if label in known else len(known), label))

    @property
    def measures(self) -> list[str]:
        """All six dimensions, requested or not, the proxies, exact measures of the embedded world and its timelines, and of the course."""
        found = self.measured
        if found is None:
            return [*DIMENSIONS]
        sets = ((WORLD, found.not_world is None), (EVENTS, found.events), (COURSE, found.not_long is None))
        return [*DIMENSIONS, *PROXIES, *(name for units, is_made in sets if is_made for name in units)]


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write report.md, report.csv and report.json, each whole or not at all; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = as_tree(evaluation)
    paths = [folder / f"report.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], as_markdown(evaluation, tree))
    write_text(paths[1], table_of_videos(tree))
    write_json(paths[2], tree)
    return paths


def read_paper() -> dict[str, Any]:
    """The paper's figures with their source."""
    return json.loads(PAPER.read_text(encoding="utf-8"))


def as_tree(evaluation: Evaluation) -> dict[str, Any]:
    """The report for programs; null where a value is not available."""
    measures = evaluation.measures
    rows = sorted(evaluation.rows, key=lambda r: (evaluation.labels.index(r.label), r.video.prompt_id, r.video.seed))
    return {
        "schema": 1,
        "title": evaluation.title,
        "kind": kind(evaluation),
        "total": None,
        "no_total": NO_TOTAL,
        "baseline": evaluation.baseline,
        "vbench": evaluation.vbench,
        "measures": [*measures],
        "means": {
            label: {measure: _estimate(found) for measure, found in group.items()}
            for label, group in means(evaluation.rows, measures).items()
        },
        "differences": {
            label: {measure: _estimate(found) for measure, found in group.items()}
            for label, group in differences(evaluation.rows, measures, evaluation.baseline).items()
        },
        "headlines": {
            label: {
                dimension: {"score_upstream": scores.headline, "score_video_mean": scores.video_mean}
                for dimension in DIMENSIONS
                if (scores := evaluation.scores.get((label, dimension))) is not None
            }
            for label in evaluation.labels
        },
        "videos": [
            {
                "label": row.label,
                **as_json(row.video),
                "values": {m: finite_or_none(row.values.get(m)) for m in measures},
            }
            for row in rows
        ],
        "paper": read_paper(),
        "not_world": _NOT_ASKED if evaluation.measured is None else evaluation.measured.not_world,
        "not_long": _NOT_ASKED if evaluation.measured is None else evaluation.measured.not_long,
        "missing": list(evaluation.missing),
        "notes": [*evaluation.notes, *_differing(evaluation)],
        "failures": list(evaluation.failures),
    }


def kind(evaluation: Evaluation) -> str:
    """Name the kind of scores, to avoid confusion with VBench's leaderboard."""
    prompts = len({row.video.prompt for row in evaluation.rows})
    seeds = len({row.video.seed for row in evaluation.rows})
    what = "VBench-Long metrics, custom input" if evaluation.vbench else "Weight-free proxies, without VBench"
    return f"{what} ({_count(prompts, 'prompt')} x {_count(seeds, 'seed')})"


def table_of_videos(tree: Mapping[str, Any]) -> str:
    """One line per video and measure; the value is empty where it is not available."""
    columns = ["label", "config_id", "prompt_id", "seed", "measure", "value", "prompt", "sha256"]
    rows = [
        video | {"measure": measure, "value": value}
        for video in tree["videos"]
        for measure, value in video["values"].items()
    ]
    return as_csv(rows, columns)


def as_markdown(evaluation: Evaluation, tree: Mapping[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"# {markdown_cell(evaluation.title)}", "", *_missing_section(evaluation)]
    lines += [f"{tree['kind']}. {NO_TOTAL}", "", *_videos_section(evaluation)]
    lines += _vbench_section(evaluation, tree) if evaluation.vbench else _without_vbench()
    lines += _paper_section(evaluation, tree)
    if (found := evaluation.measured) is not None:
        lines += _proxy_section(evaluation, tree)
        lines += _section(evaluation, tree, _WORLD, WORLD, found.not_world)
        lines += _section(evaluation, tree, _EVENTS, EVENTS) if found.events else []
        lines += _section(evaluation, tree, _COURSE, COURSE, found.not_long)
    for heading, sentences in (("Notes", tree["notes"]), ("Failed", tree["failures"])):
        if sentences:
            lines += [f"## {heading}", "", *(f"- {markdown_cell(sentence)}" for sentence in sentences), ""]
    return "\n".join([*lines, "Every value of every video is in `report.csv` and `report.json`.", ""])


def _missing_section(evaluation: Evaluation) -> list[str]:
    """State which videos are missing, and that figures are over the others."""
    if not evaluation.missing:
        return []
    heading = "**Some requested videos are missing; all figures are over the rest.**"
    return [heading, "", *(f"- {markdown_cell(sentence)}" for sentence in evaluation.missing), ""]


def _videos_section(evaluation: Evaluation) -> list[str]:
    rows = []
    for label in evaluation.labels:
        videos = [row.video for row in evaluation.rows if row.label == label]
        shapes = sorted({f"{v.num_frames} frames of {v.size[0]} x {v.size[1]} at {float(v.fps):g} fps" for v in videos})
        prompts = len({v.prompt for v in videos})
        rows.append([label, len(videos), prompts, "; ".join(shapes)])
    return [markdown_table(["method", "videos", "prompts", "each"], rows)]


def _vbench_section(evaluation: Evaluation, tree: Mapping[str, Any]) -> list[str]:
    vbench = evaluation.vbench or {}
    versions = ", ".join(f"{name} {number}" for name, number in (vbench.get("versions") or {}).items() if number)
    asked = ", ".join(evaluation.dimensions)
    lines = [
        "## VBench-Long",
        "",
        f"Checkout {vbench.get('commit') or 'without git'}, sources {str(vbench.get('sources'))[:12]}; "
        f"{versions}. Asked for: "
        f"{asked}.",
        "",
        "Means over prompts (seeds of a prompt averaged first) with 95 % bootstrap intervals, "
        f"where there are {MIN_COUNT} prompts or more. A still video has high "
        "consistency: read both consistencies together with dynamic_degree.",
        "",
        _estimates(evaluation, tree["means"], DIMENSIONS),
    ]
    if len(evaluation.labels) > 1:
        lines += [
            f"Differences from {evaluation.baseline}, on the prompts and seeds that both have; bold where the "
            "interval leaves out 0:",
            "",
            _estimates(evaluation, tree["differences"], DIMENSIONS, signed=True),
        ]
    lines += [
        "VBench's own headline, in which every clip counts the same:",
        "",
        markdown_table(
            ["method", *DIMENSIONS],
            [
                [label, *(_plain(tree["headlines"][label].get(d, {}).get("score_upstream")) for d in DIMENSIONS)]
                for label in evaluation.labels
            ],
        ),
    ]
    return lines


def _without_vbench() -> list[str]:
    return [
        "## VBench-Long",
        "",
        markdown_table(["dimension", "value"], [[dimension, MISSING] for dimension in DIMENSIONS]),
        "It was not run: `launch/evaluate.py --vbench CHECKOUT --python PYTHON` does, see docs/vbench.md.",
        "",
    ]


def _paper_section(evaluation: Evaluation, tree: Mapping[str, Any]) -> list[str]:
    """The paper's tables, with our figures beside rows of the same method and model."""
    paper = tree["paper"]
    models = {row.video.model for row in evaluation.rows}
    lines = ["## Comparison with the paper", "", f"{paper['source']}. {paper['note']}", ""]
    for table in paper["tables"]:
        same = all(model and any(path in model for path in table["model_paths"]) for model in models)
        lines += [f"### {table['name']}: {table['model']}", "", _comparable(same, table, evaluation), ""]
        rows = []
        for row in table["rows"]:
            rows.append([f"{row['name']} (paper)", *(f"{value:.4f}" for value in row["values"])])
            if not same or not evaluation.vbench:
                continue
            ours = _labels_of(row, evaluation)
            for label in ours:
                found = tree["means"][label]
                rows.append([f"{label} (here)", *(_plain((found[d] or {}).get("mean")) for d in paper["columns"])])
            if not ours:
                rows.append([f"{row['name']} (here)", *("not made" for _ in paper["columns"])])
        lines += [markdown_table(["method", *paper["columns"]], rows)]
    return lines


def _labels_of(row: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    """Return the labels whose videos match a row of the paper: its method, and its settings if it has any."""
    wanted = {"method": row["method"], **row.get("settings", {})}
    return [
        label
        for label in evaluation.labels
        if all(
            wanted.items() <= {**dict(scored.video.settings), "method": scored.video.method}.items()
            for scored in evaluation.rows
            if scored.label == label
        )
    ]


def _comparable(same: bool, table: Mapping[str, Any], evaluation: Evaluation) -> str:
    if not same:
        return "Figures of another model than the one evaluated here; for orientation only."
    lengths = sorted({row.video.num_frames for row in evaluation.rows})
    if lengths != [table["num_frames"]]:
        return f"The same model at {table['num_frames']} frames; here videos have {', '.join(map(str, lengths))}."
    return "The same model and length; prompts differ, because the paper's list is not published."


def _proxy_section(evaluation: Evaluation, tree: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Proxies",
        "",
        "Measures without networks. They are not VBench dimensions, and no correlation with VBench has been measured.",
        "",
        *_by_measure(evaluation, tree, {name: f"`{name}`" for name in PROXIES}),
    ]
    lines += [f"- `{name}`: {meaning}" for name, meaning in PROXIES.items()]
    return [*lines, "", "None of them measures aesthetic quality, a subject's identity or the match with the text.", ""]


def _section(
    evaluation: Evaluation, tree: Mapping[str, Any], heading: str, units: Mapping[str, str], missing: str | None = None
) -> list[str]:
    """A section with the table of these measures, or why there is none."""
    if missing is not None:
        return [f"## {heading}", "", f"{MISSING[0].upper()}{MISSING[1:]}: {markdown_cell(missing)}.", ""]
    names = {name: f"`{name}`, {unit}" for name, unit in units.items()}
    return [f"## {heading}", "", _ABOUT[heading], "", *_by_measure(evaluation, tree, names)]


def _by_measure(evaluation: Evaluation, tree: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Means by measure and method, and differences from the baseline; `names` has the row title of each measure."""
    rows = [
        [words, *(_cell(tree["means"][label][name]) for label in evaluation.labels)] for name, words in names.items()
    ]
    lines = [markdown_table(["measure", *evaluation.labels], rows)]
    others = [label for label in evaluation.labels if label != evaluation.baseline]
    if others:
        rows = [
            [words, *(_cell(tree["differences"][label][name], signed=True) for label in others)]
            for name, words in names.items()
        ]
        lines += [f"Differences from {evaluation.baseline}:", "", markdown_table(["measure", *others], rows)]
    return lines


def _differing(evaluation: Evaluation) -> list[str]:
    """Note differences between methods other than the method: shapes and sets of videos."""
    shapes: dict[tuple[Any, ...], set[str]] = {}
    pairs: dict[str, set[tuple[str, int]]] = {}
    for row in evaluation.rows:
        video = row.video
        shapes.setdefault((video.num_frames, video.size, video.fps), set()).add(row.label)
        pairs.setdefault(row.label, set()).add(video.pair)
    notes = []
    if len(shapes) > 1:
        notes.append("Videos differ in length, size or rate, which alone changes scores.")
    common = set.intersection(*pairs.values())
    if any(found != common for found in pairs.values()):
        counts = ", ".join(f"{label} {len(found)}" for label, found in sorted(pairs.items()))
        notes.append(
            f"Methods have different videos ({counts}; {len(common)} in common): means are over each method's videos, "
            "differences over common ones."
        )
    asked = evaluation.dimensions if evaluation.vbench else ()
    if not all(math.isfinite(row.values.get(d, math.nan)) for row in evaluation.rows for d in asked):
        notes.append(f"Some requested dimensions are {MISSING}; see the failures.")
    return notes


def _estimates(
    evaluation: Evaluation, found: Mapping[str, Mapping[str, Any]], measures: Sequence[str], *, signed: bool = False
) -> str:
    rows = [
        [label, *(_cell(found[label][m], signed=signed) for m in measures)]
        for label in evaluation.labels
        if label in found
    ]
    return markdown_table(["method", *measures], rows)


def _cell(found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if found is None:
        return MISSING
    text = difference(found, decimals=_DECIMALS) if signed else estimate(found, decimals=_DECIMALS)
    return text if found["low"] is not None else f"{text} ({_count(found['prompts'], 'prompt')})"


def _plain(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def _estimate(found: Estimate) -> dict[str, Any] | None:
    if found.count == 0:
        return None
    numbers = {"mean": found.mean, "low": found.low, "high": found.high}
    return {name: finite_or_none(value) for name, value in numbers.items()} | {"prompts": found.count}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
