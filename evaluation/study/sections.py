"""Sections of the findings page, each from the report of one command; `Not measured yet` if there is none."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files.tables import markdown_table
from engine.paths import REPOSITORY
from evaluation.markdown import Report, difference, estimate, number, tables
from evaluation.study.claims import (
    CLAIMS,
    Answer,
    Claim,
    Sign,
    answers,
    changes,
    noise_effects,
    not_made,
    read,
)
from metrics.bootstrap import Estimate

PROMPTS = "configs/prompts/world-heldout-40.txt"

SAME_NOISE = "All six methods from the same noise"

LOW_RANK_MEASURES: dict[str, Sign] = {"flow_mean": "less", "flow_strongest": "less", "laplacian_variance": "less"}

WHY_NOT = {
    "concentration": """Possible reasons where it does not fall: a head of the embedded model has few dimensions, which bounds its effective rank; the
world is one object on a plain background, so that a longer window adds little; and all windows see the states of one generation, that of
`direct`, while the paper does not say whether its curves do.""",
    "low_rank": """Possible reasons where it is not weaker or smoother: directions are removed in every layer at every step, and later layers were not trained on such
outputs. With a small share of its few dimensions a head of the embedded model may flicker, which counts as motion and detail.""",
    "claims": """Further reasons for rows that are not decided or the opposite: pictures are 64 pixels wide, so that flow
and sharpness of a plain shape come from its outline, and flicker and morphing count as motion and detail. A model this small errs at
native length already ([its card](../tiny/wan/README.md)). Motions in this world are periodic, which full attention over four native lengths may exploit. The paper's
constants of FreeSpec are not public.""",
}


def concentration(analysis: Report | None, figure: str | None) -> str:
    """The effective rank at each window, stage by stage, and how its fall reads."""
    lines = ["## Spectral concentration: does the rank fall as the window grows?", ""]
    if analysis is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    told, settings = analysis["spectra"], analysis["comparison"]["settings"]
    lines += [
        f"Measured while `{settings['method.name']}` makes videos of {len(analysis['comparison']['prompts'])} prompts; {_made_with(settings)}. "
        "Repeat it, in about half an hour, with",
        "",
        f"    python launch/analyze.py --model.device cpu --method.name {settings['method.name']} --video.num_frames {settings['video.num_frames']} "
        f"--sampler.num_steps {settings['sampler.num_steps']} --prompts {PROMPTS} --num_prompts {len(analysis['comparison']['prompts'])} "
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
    lines += [markdown_table(header, rows)]
    if figure is not None:
        lines += [f"![Effective rank over the run at each window]({figure})", ""]
    if set(verdicts) != {"falls"}:
        lines += [WHY_NOT["concentration"], ""]
    return "\n".join(lines)


def low_rank(analysis: Report | None) -> str:
    """Motion and detail of videos whose attention is of low rank, against those of the whole."""
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
        body.append([*cells, *(estimate(each, signed=True) for each in differences), verdict])
    count = rows[next(iter(LOW_RANK_MEASURES)), whole]["prompts"]
    settings = analysis["comparison"]["settings"]
    lines += [
        f"Every attention output keeps only its strongest directions (Fig. 2c, 2d); {count} of the prompts above, "
        f"{_made_with(settings)}. The paper finds that layout stays, and that motion and detail weaken. Differences are from "
        f"{100 * whole:g} % of the directions, paired by prompt, and judged at the smallest share. "
        f"{_count(verdicts, 'as the paper says', 'of the measures')}",
        "",
        markdown_table(
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


def report_command(report: Report | None, *, runs: Path, kept: Path) -> str:
    """The command that compares two methods from the kept measures, without its --methods."""
    if report is None:
        return ""
    device = report["comparison"]["settings"]["device"]
    seeds = ",".join(map(str, sorted({each["seed"] for each in report["videos"]})))
    return (
        f"python launch/compare.py --model.device {device} --prompts {PROMPTS} --seeds {seeds} "
        f"--measures {_shown(kept / 'videos.jsonl')} --out {_shown(runs)} --report_only --report runs/claim"
    )


def _shown(path: Path) -> str:
    """A path as a command in the repository's folder names it."""
    full = path.absolute()
    return str(full.relative_to(REPOSITORY) if full.is_relative_to(REPOSITORY) else full)


def claims(report: Report | None, command: str) -> list[str]:
    """A section for each of `CLAIMS`, possible reasons for other answers, and the `command` that repeats a table."""
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
    methods = f"--methods {CLAIMS[0].method},{CLAIMS[0].other} --baseline {CLAIMS[0].other}"
    sections.append(f"Repeat any of these tables from the kept measures, in moments:\n\n    {command} {methods}\n")
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
            estimate(line.difference, signed=True),
            f"{line.agreeing} of {line.difference.count}",
            line.verdict,
        ]
        for line in found
    ]
    header = ["measure", "expected", f"{claim.method} − {claim.other}", "prompts with that sign", "reads"]
    count = _count(verdicts, "as the paper says", "of the measures")
    lines = [f"## {claim.title}", "", f"{claim.text} {count}", "", markdown_table(header, rows)]
    if set(verdicts) != {"as the paper says"}:
        lines += [claim.why_not, ""]
    return "\n".join(lines)


def _count(verdicts: Sequence[str], wanted: str, what: str) -> str:
    """`In 3 of 5 of the measures: as the paper says; 1 not decided, 1 the opposite.`"""
    others = [word for word in dict.fromkeys(verdicts) if word != wanted]
    rest = "".join(f", {verdicts.count(word)} {word}" for word in others)
    return f"In {verdicts.count(wanted)} of {len(verdicts)} {what}: {wanted}{rest}."


def method_tables(title: str, report: Report | None, clips: str | None = None, *, above: Report | None = None) -> str:
    """All measures of a report, its notes, and seconds; with `above` only labels and notes that it lacks, and no seconds."""
    if report is None:
        return f"## {title}\n\nNot measured yet.\n"
    settings = report["comparison"]["settings"]
    notes = [note for note in report["notes"] if above is None or note not in above["notes"]]
    lines = [f"## {title}", "", f"{' '.join(notes)} Checkpoint `{settings['checkpoint']}`.", ""]
    lines += [_noises(report["noise"]), ""]
    if known := [f"`{label}`" for label in report["noise"] if above is not None and label in above["noise"]]:
        lines += [f"The tables above have {', '.join(known)}.", ""]
    lines += [tables(report, without=() if above is None else above["noise"].keys())]
    if clips is not None:
        lines += [f"![Clip after clip]({clips})", ""]
    if above is None:
        rows = [
            [
                label,
                *(number(found[key]) if found[key] is not None else "–" for key in ("denoise", "decode")),
                _steps(found),
            ]
            for label, found in report["times"].items()
        ]
        lines += ["Seconds (medians):", ""]
        lines += [markdown_table(["method", "denoising", "decoding", "a step (number of them)"], rows)]
    return "\n".join(lines)


def same_noise(own: Report | None, same: Report | None) -> str:
    """Methods that bring their own noise, with the noise of the others, and what their own noise changes."""
    lines = [method_tables(SAME_NOISE, same, above=own)]
    found = [] if own is None or same is None else noise_effects(own, same)
    if found:
        methods = list(dict.fromkeys(each.method for each in found))
        cells = {(each.metric, each.method): each for each in found}
        rows = [
            [f"`{metric}` ({unit})", *(difference(cells[metric, method].difference) for method in methods)]
            for metric, unit in dict.fromkeys((each.metric, each.unit) for each in found)
        ]
        differ = sum(each.difference.leaves_out_zero for each in found)
        lines += [
            f"Effect of a method's own noise: with it − with the noise of the others, paired by prompt. In {differ} of {len(found)} "
            f"the interval leaves out 0; about {round(0.05 * len(found))} would by chance.",
            "",
            markdown_table(["measure", *methods], rows),
        ]
    return "\n".join(lines)


def _noises(noise: dict[str, str]) -> str:
    """Which methods began with which kind of noise, and what that means for a difference."""
    labels = {
        kind: [f"`{label}`" for label, of in noise.items() if of == kind] for kind in dict.fromkeys(noise.values())
    }
    if len(labels) == 1:
        return f"Initial noise: {next(iter(labels))} for every method."
    told = "; ".join(f"{kind} of {', '.join(found)}" for kind, found in labels.items())
    return (
        f"Initial noise: {told}. Differences between methods with different noise include its effect; "
        "`--sampler.noise iid` gives all the same."
    )


def _steps(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{kind} {number(step['median'])} ({step['per_run'] or '–'})" for kind, step in found["steps"].items()
    )


def step_count(tables: Report | None, rerun: Report | None) -> str:
    """The claims' differences at another number of steps."""
    lines = ["## What the number of steps changes", ""]
    if tables is None or rerun is None:
        return "\n".join([*lines, "Not measured yet.", ""])
    here, there = (report["comparison"]["settings"]["sampler.num_steps"] for report in (tables, rerun))
    found = changes(tables, rerun)
    if not found:
        absent = "Not made: the two reports have no prompt with two methods that the sections above compare."
        return "\n".join([*lines, absent, ""])
    verdicts = [each.verdict for each in found]
    lines += [
        f"The tables above are of {here} denoising steps. {len(rerun['videos'])} videos were also made with {there}. Each difference of the "
        f"sections above, on the prompts that have all four values. {_count(verdicts, 'no change seen', 'of the differences')}",
        "",
    ]
    rows = [
        [
            f"{each.method} − {each.other}",
            f"`{each.metric}` ({each.unit})",
            str(each.change.count),
            *(estimate(told, signed=True) for told in (each.tables, each.rerun, each.change)),
            each.verdict,
        ]
        for each in found
    ]
    header = ["difference", "measure", "prompts", f"{here} steps", f"{there} steps", f"{there} − {here}", "reads"]
    return "\n".join([*lines, markdown_table(header, rows)])


def calibration(report: Report | None, told_parts: Mapping[str, str]) -> str:
    """What the search for settings found, and how it was judged; `told_parts` says what each part of the score is."""
    lines = ["## Calibration of FreeSpec's open settings", ""]
    if report is None:
        return "\n".join([*lines, "Not measured yet: the defaults are start values.", ""])
    parts = "; ".join(f"{name}: {what}" for name, what in told_parts.items())
    rounds = ", ".join(f"{len(each['scores'])} on {each['prompts']} prompts" for each in report["rounds"])
    steps, settings = report["num_steps"], report["comparison"]["settings"]
    lines += [
        f"{len(report['trials'])} settings, the defaults and others drawn with seed {report['search_seed']} from the lists below, were tried on "
        f"prompts that no other table here uses: {rounds}; the best third of each round continued. The score "
        f"is the mean of four shares from 0 to 1 ({parts}). Searched with videos of {steps['search']} steps, judged with {steps['judged']}; "
        f"{settings['video.num_frames']} frames, checkpoint `{settings['checkpoint']}`.",
        "",
        markdown_table(
            ["setting", "values"],
            [[f"`{name}`", ", ".join(map(str, values))] for name, values in report["space"].items()],
        ),
    ]
    best, judged = report["best"], report["judged"]
    if judged is None:
        return "\n".join([*lines, "No setting was better than the current ones, which are kept.", ""])
    settings = ", ".join(f"`{name}` {value}" for name, value in judged["settings"].items())
    body = [
        [label, number(judged["score"][label]), *(number(judged["parts"][label][name]) for name in told_parts)]
        for label in judged["score"]
    ]
    verdict = (
        "The interval lies above 0: the report supports the change."
        if judged["supported"]
        else "The interval does not lie above 0: the defaults are kept."
    )
    lines += [
        f"The best, {best} ({settings}), on the {judged['prompts']} held-out prompts with seeds {judged['seeds']}:",
        "",
        markdown_table(["settings", "score", *told_parts], body),
        f"Difference in score, paired by prompt: {estimate(judged['difference'], signed=True)}. {verdict}",
        "",
    ]
    return "\n".join(lines)
