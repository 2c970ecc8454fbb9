"""findings.py: docs/findings.md from the reports of `make findings`, without a number that was typed by hand."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from engine.checkpoint import atomic_path
from engine.errors import UserError
from launch.calibration.score import PARTS
from launch.cli import REPOSITORY, Keys, arrange, make_parser, parse
from launch.comparison.claims import CLAIMS, Answer, Claim, answers, changes
from launch.comparison.markdown import estimate, table, tables
from launch.comparison.page import number
from launch.comparison.summary import as_json
from launch.outputs import expand

USAGE = "findings.py [--runs FOLDER] [--calibration FOLDER] [--page FILE]"
DESCRIPTION = "Write the page of findings from the reports that `make findings` and launch/calibrate.py left."

INTRO = """# Findings on the embedded model

Written by `python launch/findings.py` from the reports of

    make findings       # all six methods and the seven ablation rows on held-out prompts; spectra of 20 of them
    make calibrate      # the search for FreeSpec's open settings

do not edit. Both take hours in the background, one thread a process, go on where they were stopped, and
[compare.md](compare.md) says what they cost. Every interval is a 95 % bootstrap interval over prompts, every difference is paired by prompt;
[compare.md](compare.md#how-to-read-the-numbers) says what each measure is and where it fails. The embedded model is small and its world is
simple: what holds here need not hold on Wan2.1, and the other way round.
"""

WHY_NOT = {
    "concentration": """Where it does not fall, or in part only: a head of the embedded model has few dimensions, which bounds its effective
rank at any window; the world is one object before an even background, so that tokens far away in time are much like those near by, and a
wider window adds little that is new; and the windows see the states of one generation, those of `direct`, while the paper does not say
whether its curves come from one generation or one per window.""",
    "claims": """Where a row is not decided or the opposite, these are the reasons to think of first. The pictures are 64 pixels wide: optical
flow and sharpness of a plain shape are its outline and little else, and flicker and morphing count as motion and detail. A model this small
errs at native length already (its card has the figures), and that error is in every method. The object of the world returns at the
other edge and its motions are even, so that full attention over four native lengths may find the phase of the motion, which
no natural video has. And the constants of FreeSpec are not the paper's, which are not public.""",
}

TRANSFER = """## What transfers to Wan2.1, and what cannot be known without its weights

What is a property of the method and not of a model transfers: the equality of every method with its published form, the cost of a step of
each kind in attention calls, that all ranks make the same video, that a difference between two rows of the ablation is that of their settings
alone. The commands transfer as they are: `--config configs/wan2.1-t2v-1.3b.yaml` makes the same tables, without the exact measures.

Which settings are best does not transfer by itself. The share of fused steps that a `split` means depends on the scheduler's shift (with
`domain: timestep`, split 0.5 fuses 84 % of 50 steps at shift 5 and 90 % at shift 8), which the embedded model need not share; `alpha` is read along
that same axis. `beta` acts along a spectrum of D directions, 128 of a head of Wan. How strongly the global branch over-smooths, and so how
much of it helps, is a matter of training data and length. Unknown without Wan's weights: the level of every measure, whether the
spectra concentrate as in the paper's Fig. 2, whether the order of the methods is that of its Table 1, and its VBench scores
([vbench.md](vbench.md) says how they are made)."""


def main(argv: list[str]) -> None:
    """Read what is there and write the page; UserError if nothing is, or a file is not a report."""
    options = _parse(argv)
    runs, page = expand(options.runs), expand(options.page)
    reports = {name: _read(runs / name / "report.json") for name in ("methods", "ablation", "steps", "analysis")}
    reports["calibration"] = _read(expand(options.calibration) / "report.json")
    if not any(reports.values()):
        raise UserError(f"neither {runs} nor {options.calibration} holds a report; run make findings first")
    figures = page.parent / "figures"
    drawn = _copy_figures(runs, figures) if any(reports[name] for name in ("methods", "analysis")) else {}
    text = "\n".join(
        [
            INTRO,
            _concentration(reports["analysis"], drawn),
            *_claims(reports["methods"]),
            _tables("All six methods", reports["methods"], drawn.get("clips")),
            _tables(
                "The ablation: rows of the paper's Table 3 (`freespec` is LB + RA + TA + T-GR)", reports["ablation"]
            ),
            _step_count(reports["methods"], reports["steps"]),
            _calibration(reports["calibration"]),
            TRANSFER,
            "",
        ]
    )
    try:
        with atomic_path(page) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {page}: {error.strerror or error}") from error
    missing = [name for name, report in reports.items() if report is None]
    print(f"{page}: written" + (f"; not measured yet: {', '.join(missing)}" if missing else ""))


def _parse(argv: Sequence[str]) -> Any:
    parser: ArgumentParser = make_parser("findings.py", USAGE, DESCRIPTION)
    parser.add_argument(
        "--runs", type=str, default="runs/findings", help="folder with methods/, ablation/ and analysis/"
    )
    parser.add_argument("--calibration", type=str, default="runs/calibration", help="folder of calibrate.py")
    parser.add_argument("--page", type=str, default=str(REPOSITORY / "docs" / "findings.md"), help="the page to write")
    return parse(parser, arrange(argv, Keys.of(parser)))


def _read(path: Path) -> dict[str, Any] | None:
    """A report.json; None if it was not made yet."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); make it again") from error


def _copy_figures(runs: Path, figures: Path) -> dict[str, str]:
    """Copies the plots that the page shows beside it; their addresses there, by name."""
    wanted = {"rank-progress": runs / "analysis/rank-progress.png", "clips": runs / "methods/plots/clips.png"}
    shown = {}
    try:
        figures.mkdir(parents=True, exist_ok=True)
        for name, source in wanted.items():
            if source.is_file():
                with atomic_path(figures / f"findings-{name}.png") as part:
                    shutil.copyfile(source, part)
                shown[name] = f"figures/findings-{name}.png"
    except OSError as error:
        raise UserError(f"cannot copy plots to {figures}: {error.strerror or error}") from error
    return shown


def _concentration(analysis: dict[str, Any] | None, drawn: dict[str, str]) -> str:
    lines = ["## Spectral concentration: does the rank fall as the window grows?", ""]
    if analysis is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    told = analysis["spectra"]
    rows, verdicts = [], []
    for stage, found in told["stages"].items():
        for line in found["windows"][1:]:
            difference = line["difference"]
            verdict = _falls(difference)
            verdicts.append(verdict)
            cells = [stage, f"{found['progress']:.2f}", f"{line['multiple']} x", estimate(found["windows"][0]["mean"])]
            rows.append([*cells, estimate(line["mean"]), estimate(difference, signed=True), verdict])
    header = ["stage", "progress", "window", "rank, native window", "rank", "difference", "reads"]
    lines += [_count(verdicts, "falls", "of the stages and windows the effective rank")]
    share = 100 * told["heads_that_fall"]
    lines += [f"Over the whole run it is lower at the widest window in {share:.0f} % of the heads.", ""]
    lines += [table(header, rows)]
    if "rank-progress" in drawn:
        lines += [f"![Effective rank over the run at each window]({drawn['rank-progress']})", ""]
    if set(verdicts) != {"falls"}:
        lines += [WHY_NOT["concentration"], ""]
    if analysis.get("low_rank"):
        lines += [
            "Videos of low rank, whose every attention output is its strongest directions alone (mean over prompts):",
            "",
        ]
        shown = ("flow_mean", "flow_strongest", "laplacian_variance", "interpolation_error")
        ratios = list(dict.fromkeys(row["ratio"] for row in analysis["low_rank"]))
        mean = {(row["metric"], row["ratio"]): row["mean"] for row in analysis["low_rank"]}
        body = [[f"`{name}`", *(number(mean[name, ratio]) for ratio in ratios)] for name in shown]
        lines += [table(["share kept", *(f"{100 * ratio:g} %" for ratio in ratios)], body)]
    return "\n".join(lines)


def _falls(difference: dict[str, Any]) -> str:
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "not decided"
    return "falls" if difference["high"] < 0 else "rises"


def _claims(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return ["## What the paper says of the methods\n\nNot measured yet.\n"]
    found = [(claim, answers(claim, report)) for claim in CLAIMS]
    sections = [_claim(claim, lines) for claim, lines in found]
    if any(line.verdict != "as the paper says" for _, lines in found for line in lines):
        sections.append(f"{WHY_NOT['claims']}\n")
    return sections


def _claim(claim: Claim, found: Sequence[Answer]) -> str:
    verdicts = [line.verdict for line in found]
    rows = [
        [
            f"`{line.metric}` ({line.unit})",
            line.sign,
            estimate(as_json(line.difference), signed=True),
            line.verdict,
        ]
        for line in found
    ]
    header = ["measure", "expected", f"{claim.method} − {claim.other}", "reads"]
    count = _count(verdicts, "as the paper says", "of the measures")
    return "\n".join([f"## {claim.title}", "", f"{claim.text} {count}", "", table(header, rows)])


def _count(verdicts: Sequence[str], wanted: str, what: str) -> str:
    """`In 3 of 5 of the measures: as the paper says; 1 not decided, 1 the opposite.`"""
    others = [word for word in dict.fromkeys(verdicts) if word != wanted]
    rest = "".join(f", {verdicts.count(word)} {word}" for word in others)
    return f"In {verdicts.count(wanted)} of {len(verdicts)} {what}: {wanted}{rest}."


def _tables(title: str, report: dict[str, Any] | None, clips: str | None = None) -> str:
    if report is None:
        return f"## {title}\n\nNot measured yet.\n"
    lines = [f"## {title}", "", " ".join(report["notes"]), ""]
    times = [
        [
            label,
            *(number(found[key]) if found[key] is not None else "–" for key in ("denoise", "decode")),
            _steps(found),
        ]
        for label, found in report["times"].items()
    ]
    lines += [tables(report)]
    if clips is not None:
        lines += [f"![Clip after clip]({clips})", ""]
    lines += ["Seconds, on the machine that the notes name or the one that all videos were made on:", ""]
    lines += [table(["method", "denoising", "decoding", "a step (number of them)"], times)]
    return "\n".join(lines)


def _steps(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{kind} {number(step['median'])} ({step['per_run'] or '–'})" for kind, step in found["steps"].items()
    )


def _step_count(tables: dict[str, Any] | None, rerun: dict[str, Any] | None) -> str:
    lines = ["## What the number of steps changes", ""]
    if tables is None or rerun is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    here, there = (report["comparison"]["settings"]["sampler.num_steps"] for report in (tables, rerun))
    found = changes(tables, rerun)
    verdicts = [each.verdict for each in found]
    lines += [
        f"The tables above are of {here} denoising steps. {len(rerun['videos'])} videos were made with {there} as well. For every difference "
        f"that the sections above speak of, both on the {found[0].change.count} prompts that have both, and what becomes of it, paired by "
        f"prompt. {_count(verdicts, 'no change seen', 'of the differences')}",
        "",
    ]
    rows = [
        [
            f"{each.method} − {each.other}",
            f"`{each.metric}` ({each.unit})",
            *(estimate(as_json(told), signed=True) for told in (each.tables, each.rerun, each.change)),
            each.verdict,
        ]
        for each in found
    ]
    header = ["difference", "measure", f"{here} steps", f"{there} steps", f"{there} − {here}", "reads"]
    return "\n".join([*lines, table(header, rows)])


def _calibration(report: dict[str, Any] | None) -> str:
    lines = ["## Calibration of FreeSpec's open settings", ""]
    if report is None:
        return "\n".join([*lines, "Not measured yet: the defaults are start values.", ""])
    parts = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    rounds = ", ".join(f"{len(each['scores'])} on {each['prompts']} prompts" for each in report["rounds"])
    lines += [
        f"{len(report['trials'])} settings, drawn with seed {report['search_seed']} from the lists below with the present ones among "
        f"them, were tried on prompts that no other table here uses: {rounds}, each time the best third going on. The score "
        f"is the mean of four shares, 0 to 1 ({parts}).",
        "",
        table(
            ["setting", "values"],
            [[f"`{name}`", ", ".join(map(str, values))] for name, values in report["space"].items()],
        ),
    ]
    best, judged = report["best"], report["judged"]
    if judged is None:
        return "\n".join([*lines, "None was better than the present settings, which stay.", ""])
    settings = ", ".join(f"`{name}` {value}" for name, value in judged["settings"].items())
    body = [
        [label, number(judged["score"][label]), *(number(judged["parts"][label][name]) for name in PARTS)]
        for label in judged["score"]
    ]
    verdict = (
        "The interval lies above 0: the report supports the change."
        if judged["supported"]
        else "The interval does not lie above 0: the defaults stay as they are."
    )
    lines += [
        f"The best, {best} ({settings}), on the {judged['prompts']} held-out prompts with seeds {judged['seeds']}:",
        "",
        table(["settings", "score", *PARTS], body),
        f"Difference in score, paired by prompt: {estimate(judged['difference'], signed=True)}. {verdict}",
        "",
    ]
    return "\n".join(lines)
