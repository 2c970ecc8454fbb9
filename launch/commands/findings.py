"""findings.py: docs/findings.md from the reports of `make findings`, without a number that was typed by hand."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from engine.checkpoint import atomic_path
from engine.errors import UserError
from engine.paths import expand
from launch.calibration.score import PARTS
from launch.cli import REPOSITORY, Keys, arrange, make_parser, parse
from launch.comparison.claims import CLAIMS, Answer, Claim, Sign, answers, changes, not_made, read, remaining
from launch.comparison.kept_reports import TABLES, Report, read_report, refuse_mixed
from launch.comparison.markdown import estimate, table, tables
from launch.comparison.page import number
from launch.comparison.summary import as_json
from launch.comparison.transfer import transfer_section
from metrics.bootstrap import Estimate

USAGE = "findings.py [--runs FOLDER] [--kept FOLDER] [--page FILE]"
DESCRIPTION = "Write the page of findings from the reports that `make findings` and launch/calibrate.py left."

PROMPTS = "configs/prompts/world-heldout-40.txt"
REPORT_ONLY = (
    f"python launch/compare.py --model.device cpu --prompt_file {PROMPTS} --num_seeds 2 --measures docs/findings/videos.jsonl "
    "--out runs/findings --report_only --report runs/claim"
)

SAME_NOISE = "All six methods from the same noise"

LOW_RANK_MEASURES: dict[str, Sign] = {"flow_mean": "less", "flow_strongest": "less", "laplacian_variance": "less"}

INTRO = """# Findings on the embedded model

Written by `python launch/findings.py` from the reports of

    make findings       # all six methods and the seven ablation rows on held-out prompts; spectra of 20 of them
    make calibrate      # the search for FreeSpec's open settings

do not edit. The measures of every video are in [{kept}]({kept}), and what they have is not made again;
[compare.md](compare.md#the-full-tables) says how to make all of it anew, and what that costs. Every interval is a 95 % bootstrap interval over prompts, every difference is paired by prompt;
[compare.md](compare.md#how-to-read-the-numbers) says what each measure is and where it fails. The embedded model is small and its world is
simple: what holds here need not hold on Wan2.1, and the other way round.
"""

WHY_NOT = {
    "concentration": """Where it does not fall, or in part only: a head of the embedded model has few dimensions, which bounds its effective
rank at any window; the world is one object before an even background, so that tokens far away in time are much like those near by, and a
wider window adds little that is new; and the windows see the states of one generation, those of `direct`, while the paper does not say
whether its curves come from one generation or one per window.""",
    "low_rank": """Where it is not weaker or smoother: directions are taken from every layer at every step, and what the next layers and steps make of
an output that none of them was trained on need not be a smooth picture. A head of the embedded model has few dimensions: with a small share
of them it may flicker, which counts as motion and detail.""",
    "claims": """Where a row above is not decided or the opposite, these are the reasons to think of besides those of its section. The pictures are 64 pixels wide: optical
flow and sharpness of a plain shape are its outline and little else, and flicker and morphing count as motion and detail. A model this small
errs at native length already (its card has the figures), and that error is in every method. The object of the world returns at the
other edge and its motions are even, so that full attention over four native lengths may find the phase of the motion, which
no natural video has. And the constants of FreeSpec are not the paper's, which are not public.""",
}


def main(argv: list[str]) -> None:
    """Read what is there and write the page, with `Not measured yet` for what is not; UserError if a file is no report."""
    options = _parse(argv)
    runs, page = expand(options.runs), expand(options.page)
    files = {name: runs / name / "report.json" for name in TABLES}
    kept = expand(options.kept)
    files |= {name: kept / name / "report.json" for name in ("analysis", "calibration")}
    reports = {name: read_report(file, name) for name, file in files.items()}
    refuse_mixed(reports, files)
    plots = {"methods": runs / "methods/plots/clips.png", "analysis": kept / "analysis/rank-progress.png"}
    figures = {name: None if reports[name] is None else _figure(plot, page) for name, plot in plots.items()}
    text = "\n".join(
        [
            INTRO.format(kept=os.path.relpath(kept.resolve(), page.resolve().parent)),
            *_so_far(reports),
            _concentration(reports["analysis"], figures["analysis"]),
            _low_rank(reports["analysis"]),
            *_claims(reports["methods"]),
            _tables("All six methods", reports["methods"], figures["methods"]),
            _same_noise(reports["methods"], reports["noise"]),
            _tables(
                "The ablation: rows of the paper's Table 3 (`freespec` is LB + RA + TA + T-GR)", reports["ablation"]
            ),
            _step_count(reports["methods"], reports["steps"]),
            _calibration(reports["calibration"]),
            transfer_section(),
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
    parser.add_argument("--runs", type=str, default="runs/findings", help="folder with methods/, ablation/ and steps/")
    parser.add_argument(
        "--kept",
        type=str,
        default=str(REPOSITORY / "docs" / "findings"),
        help="folder of what outlives the videos: their measures, and in analysis/ and calibration/ the reports of these",
    )
    parser.add_argument("--page", type=str, default=str(REPOSITORY / "docs" / "findings.md"), help="the page to write")
    return parse(parser, arrange(argv, Keys.of(parser)))


def _so_far(reports: Mapping[str, Report | None]) -> list[str]:
    """A sentence on what is not made yet, so that nobody takes half of a table for the whole; none if all is there."""
    parts = []
    for name in TABLES:
        report = reports[name]
        if report is not None and report["pairs"]["made"] < report["pairs"]["asked"]:
            parts.append("`{}` stands on {made} of {asked} pairs of prompt and seed".format(name, **report["pairs"]))
    missing = [f"`{name}`" for name, report in reports.items() if report is None]
    if missing:
        parts.append(f"nothing is measured of {', '.join(missing)}")
    return [f"**Not all is measured yet**: {'; '.join(parts)}.\n"] if parts else []


def _figure(plot: Path, page: Path) -> str | None:
    """The address of a plot from the page, beside which it is copied unless it lies in a folder there; None without a plot."""
    if not plot.is_file():
        return None
    if plot.resolve().is_relative_to(page.parent.resolve()):
        return plot.resolve().relative_to(page.parent.resolve()).as_posix()
    copied = page.parent / "figures" / f"findings-{plot.name}"
    try:
        copied.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(copied) as part:
            shutil.copyfile(plot, part)
    except OSError as error:
        raise UserError(f"cannot copy {plot} to {copied.parent}: {error.strerror or error}") from error
    return f"figures/{copied.name}"


def _concentration(analysis: Report | None, figure: str | None) -> str:
    lines = ["## Spectral concentration: does the rank fall as the window grows?", ""]
    if analysis is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    told, settings = analysis["spectra"], analysis["comparison"]["settings"]
    lines += [
        f"{len(analysis['comparison']['prompts'])} prompts, each beside a video of `{settings['method.name']}`; {_made_with(settings)}. "
        "Anew, which takes a while:",
        "",
        f"    python launch/analyze.py --model.device cpu --method.name {settings['method.name']} --video.num_frames {settings['video.num_frames']} "
        f"--sampler.num_steps {settings['sampler.num_steps']} --prompt_file {PROMPTS} --num_prompts {len(analysis['comparison']['prompts'])} "
        f"--num_reconstructed {max((row['prompts'] for row in analysis.get('low_rank', ())), default=0)} --out runs/analysis",
        "",
    ]
    rows, verdicts = [], []
    for stage, found in told["stages"].items():
        for line in found["windows"][1:]:
            difference = line["difference"]
            verdict = _falls(difference)
            verdicts.append(verdict)
            cells = [
                stage,
                f"{found['progress']:.2f}",
                f"{line['multiple']:g} x",
                estimate(found["windows"][0]["mean"]),
            ]
            rows.append([*cells, estimate(line["mean"]), estimate(difference, signed=True), verdict])
    header = ["stage", "progress", "window", "rank, native window", "rank", "difference", "reads"]
    lines += [_count(verdicts, "falls", "of the stages and windows the effective rank")]
    share = 100 * told["heads_that_fall"]
    lines += [f"Over the whole run it is lower at the widest window in {share:.0f} % of the heads.", ""]
    lines += [table(header, rows)]
    if figure is not None:
        lines += [f"![Effective rank over the run at each window]({figure})", ""]
    if set(verdicts) != {"falls"}:
        lines += [WHY_NOT["concentration"], ""]
    return "\n".join(lines)


def _low_rank(analysis: Report | None) -> str:
    lines = ["## Low rank: do the strongest directions keep layout and lose motion and detail?", ""]
    rows = {(row["metric"], row["ratio"]): row for row in (analysis or {}).get("low_rank", ())}
    whole, *shares = sorted({ratio for _, ratio in rows}, reverse=True) or [1.0]
    if analysis is None or not shares:
        return "\n".join([*lines, "Not measured yet.", ""])
    verdicts, body = [], []
    for metric, sign in LOW_RANK_MEASURES.items():
        found = [rows[metric, share] for share in shares]
        differences = [
            Estimate(
                mean=_or_nan(row["difference"]),
                low=_or_nan(row["low"]),
                high=_or_nan(row["high"]),
                count=row["prompts"],
            )
            for row in found
        ]
        verdict = read(differences[-1], sign)
        verdicts.append(verdict)
        first = rows[metric, whole]
        cells = [f"`{metric}` ({first['unit']})", sign, number(first["mean"])]
        body.append([*cells, *(estimate(as_json(each), signed=True) for each in differences), verdict])
    count = rows[next(iter(LOW_RANK_MEASURES)), whole]["prompts"]
    settings = analysis["comparison"]["settings"]
    lines += [
        f"Every attention output of these videos is its strongest directions alone (Fig. 2c, 2d); {count} of the prompts above, "
        f"{_made_with(settings)}. The paper finds layout and weaker, less detailed motion. Differences from the videos with "
        f"{100 * whole:g} % of the directions, paired by prompt, judged at the smallest share. "
        f"{_count(verdicts, 'as the paper says', 'of the measures')}",
        "",
        table(
            [
                "measure",
                "expected",
                f"{100 * whole:g} %",
                *(f"{100 * share:g} % − {100 * whole:g} %" for share in shares),
                "reads",
            ],
            body,
        ),
    ]
    if set(verdicts) != {"as the paper says"}:
        lines += [WHY_NOT["low_rank"], ""]
    return "\n".join(lines)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _falls(difference: dict[str, Any]) -> str:
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "not decided"
    return "falls" if difference["high"] < 0 else "rises"


def _made_with(settings: dict[str, Any]) -> str:
    """What a report's videos have in common, as far as the page needs it."""
    return (
        f"{settings['video.num_frames']} frames, {settings['sampler.num_steps']} steps, "
        f"checkpoint `{settings['checkpoint']}`"
    )


def _claims(report: Report | None) -> list[str]:
    if report is None:
        return ["## What the paper says of the methods\n\nNot measured yet.\n"]
    sections, verdicts = [], set()
    for claim in CLAIMS:
        absent = not_made(claim, report)
        found = [] if absent else answers(claim, report)
        verdicts |= {line.verdict for line in found}
        sections.append(_claim(claim, found) if found else _not_made(claim, absent))
    if verdicts & {"not decided", "the opposite"}:
        sections.append(f"{WHY_NOT['claims']}\n")
    return sections


def _not_made(claim: Claim, absent: Sequence[str]) -> str:
    """A claim that the report has no answer to."""
    what = f"videos of {', '.join(f'`{label}`' for label in absent)}" if absent else "measures that this asks for"
    return f"## {claim.title}\n\n{claim.text} Not made: the report has no {what}.\n"


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
    lines = [f"## {claim.title}", "", f"{claim.text} {count}", "", table(header, rows)]
    if set(verdicts) != {"as the paper says"}:
        lines += [claim.why_not, ""]
    methods = f"--methods {claim.method},{claim.other} --baseline {claim.other}"
    return "\n".join([*lines, "In moments, from the measures that are kept:", "", f"    {REPORT_ONLY} {methods}", ""])


def _count(verdicts: Sequence[str], wanted: str, what: str) -> str:
    """`In 3 of 5 of the measures: as the paper says; 1 not decided, 1 the opposite.`"""
    others = [word for word in dict.fromkeys(verdicts) if word != wanted]
    rest = "".join(f", {verdicts.count(word)} {word}" for word in others)
    return f"In {verdicts.count(wanted)} of {len(verdicts)} {what}: {wanted}{rest}."


def _tables(title: str, report: Report | None, clips: str | None = None, more: str = "") -> str:
    if report is None:
        return f"## {title}\n\nNot measured yet.\n"
    settings = report["comparison"]["settings"]
    lines = [f"## {title}", "", f"{' '.join(report['notes'])} Checkpoint `{settings['checkpoint']}`.", ""]
    lines += [_noises(report["noise"]), ""]
    if more:
        lines += [more, ""]
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


def _same_noise(own: Report | None, same: Report | None) -> str:
    """The methods with one kind of noise, and what becomes of the differences that they have each with its own."""
    told = []
    if own is not None and same is not None and own["baseline"] == same["baseline"]:
        for label, settings in same["comparison"]["variants"].items():
            method = settings["method.name"]
            if method in own["noise"] and label in same["noise"] and own["noise"][method] != same["noise"][label]:
                counts = remaining(own, method, same, label)
                found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "none"
                told.append(f"`{method}` {sum(counts.values())}: {found}")
    more = (
        f"Differences from the baseline that are decided above, and what they are here: {'; '.join(told)}."
        if told
        else ""
    )
    return _tables(SAME_NOISE, same, more=more)


def _noises(noise: dict[str, str]) -> str:
    """Which methods began with which kind of noise, and what that means for a difference."""
    labels = {
        kind: [f"`{label}`" for label, of in noise.items() if of == kind] for kind in dict.fromkeys(noise.values())
    }
    if len(labels) == 1:
        return f"Initial noise: {next(iter(labels))} for every method."
    told = "; ".join(f"{kind} of {', '.join(found)}" for kind, found in labels.items())
    return (
        f"Initial noise: {told}. A difference between methods of two kinds is one of noise as well: "
        f'"{SAME_NOISE}" has all from the same.'
    )


def _steps(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{kind} {number(step['median'])} ({step['per_run'] or '–'})" for kind, step in found["steps"].items()
    )


def _step_count(tables: Report | None, rerun: Report | None) -> str:
    lines = ["## What the number of steps changes", ""]
    if tables is None or rerun is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    here, there = (report["comparison"]["settings"]["sampler.num_steps"] for report in (tables, rerun))
    found = changes(tables, rerun)
    if not found:
        absent = "Not made: the two reports have no prompt with two methods of which the sections above speak."
        return "\n".join([*lines, absent, ""])
    verdicts = [each.verdict for each in found]
    lines += [
        f"The tables above are of {here} denoising steps. {len(rerun['videos'])} videos were made with {there} as well. For every difference "
        f"that the sections above speak of, both on the prompts that have all four values, and what becomes of it, paired by "
        f"prompt. {_count(verdicts, 'no change seen', 'of the differences')}",
        "",
    ]
    rows = [
        [
            f"{each.method} − {each.other}",
            f"`{each.metric}` ({each.unit})",
            str(each.change.count),
            *(estimate(as_json(told), signed=True) for told in (each.tables, each.rerun, each.change)),
            each.verdict,
        ]
        for each in found
    ]
    header = ["difference", "measure", "prompts", f"{here} steps", f"{there} steps", f"{there} − {here}", "reads"]
    return "\n".join([*lines, table(header, rows)])


def _calibration(report: Report | None) -> str:
    lines = ["## Calibration of FreeSpec's open settings", ""]
    if report is None:
        return "\n".join([*lines, "Not measured yet: the defaults are start values.", ""])
    parts = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    rounds = ", ".join(f"{len(each['scores'])} on {each['prompts']} prompts" for each in report["rounds"])
    steps, settings = report["num_steps"], report["comparison"]["settings"]
    lines += [
        f"{len(report['trials'])} settings, drawn with seed {report['search_seed']} from the lists below with the present ones among "
        f"them, were tried on prompts that no other table here uses: {rounds}, each time the best third going on. The score "
        f"is the mean of four shares, 0 to 1 ({parts}). Searched with videos of {steps['search']} steps, judged with {steps['judged']}; "
        f"{settings['video.num_frames']} frames, checkpoint `{settings['checkpoint']}`.",
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
