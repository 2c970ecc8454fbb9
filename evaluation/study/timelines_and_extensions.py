"""The sections of the page of findings on timelines and on continued videos, from the reports of their benchmarks.

A report holds the measures of each video: benchmarks/events.py and benchmarks/extensions.py write them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.files.tables import markdown_table
from evaluation.markdown import Report, estimate
from evaluation.study.reports import model_of, report_name
from evaluation.study.wan_section import EMBEDDED
from metrics.bootstrap import Estimate, mean_interval, paired_interval, seed_means

OURS = ("freespec", "scene")
JOINED = ("direct", "joined")
SHOWN_GOAL = 0.9
SWITCH_GOAL = 4.0  # frames
EVENTS = {
    "shown": "frames that show their event",
    "moves": "that move as captioned",
    "kept": "kept of what both events share",
}
WAYS = ("extension", "chain")
WRONG = "the clip is not as captioned"
CONTINUED = {
    "kept": "frames with the clip's shape, colour and background",
    "centre_seam": "object moves at the seam, px",
    "centre_between": "between latent frames",
    "centre_inside": "between frames",
    "rgb_seam": "its colour changes at the seam, grey levels",
    "rgb_between": "between latent frames",
    "rgb_inside": "between frames",
    "background_rgb_seam": "background changes at the seam, grey levels",
    "background_rgb_between": "between latent frames",
    "background_rgb_inside": "between frames",
    "rgb_slope": "slope of the object's colour, grey levels per second",
    "background_rgb_slope": "slope of the background's",
}
JUMPS = {"centre": "place, px", "rgb": "colour, grey levels", "background_rgb": "background, grey levels"}

Video = Mapping[str, Any]


def timelines(report: Report | None) -> str:
    """How well each method and transition shows its events, and the goals."""
    lines = ["## Timelines", ""]
    videos = balanced(report["videos"], "method", "transition") if report is not None else []
    if report is None or not videos:
        return "\n".join([*lines, "Not measured yet.", ""])
    values = _by(videos, EVENTS | {"switch": ""}, "method", "transition")
    ours, joined = values[OURS], values[JOINED]
    shown, switch = mean_interval(ours["shown"]), float(np.nanmedian(ours["switch"]))
    behind = paired_interval(ours["shown"], joined["shown"])
    lines += [
        f"{_count(videos)} timelines of 2 to 4 events of 32 frames; from event to event one or two of shape, colour, direction and background "
        f"change. {_made(report)} `joined` concatenates a clip for each event, an upper bound for this model; "
        "with `sliding_window` and `scene` each event has its text in its own windows only. To repeat it (slow):",
        "",
        _command("events", "docs/findings/timelines/report.json", report, videos),
        "",
        markdown_table(
            [
                "method",
                "transition",
                *EVENTS.values(),
                "switch error (median frames)",
                "shown, against freespec with scene",
            ],
            [
                [
                    *names,
                    *(estimate(mean_interval(found[name])) for name in EVENTS),
                    f"{np.nanmedian(found['switch']):.1f}",
                    "" if names == OURS else estimate(paired_interval(found["shown"], ours["shown"]), signed=True),
                ]
                for names, found in sorted(values.items(), key=lambda row: -np.nanmean(row[1]["shown"]))
            ],
        ),
        f"Goals, for `freespec` with `scene`: 90 % of the frames show their event, {_met(shown.mean >= SHOWN_GOAL)} "
        f"({estimate(shown)}, {estimate(behind, signed=True)} against `joined`); the switch within {SWITCH_GOAL:g} frames at the median, "
        f"{_met(switch <= SWITCH_GOAL)} ({switch:.1f}).",
        "",
    ]
    return "\n".join(lines)


def extensions(report: Report | None, other: Report | None = None) -> str:
    """Quality of continued videos against a chain of clips, and the goals; of `other`, of another model, the goals alone."""
    lines = ["## Continued videos", ""]
    videos = balanced(report["videos"], "way") if report is not None else []
    if report is None or not videos:
        return "\n".join([*lines, "Not measured yet.", ""])
    values, kinds = _by_way(videos), _kinds(videos)
    reports = [report] if other is None or not balanced(other["videos"], "way") else [report, other]
    lines += [
        f"{_count(videos)} clips of held-out prompts, continued from 33 to 129 frames with `freespec`. {_made(report)} `extension` is `--extend` "
        "with the clip's latents; `chain` makes clips of 33 frames, each of which begins with the last 9 existing frames, decoded and re-encoded. "
        "The seam, from the last kept frame to the first new one, where a latent frame begins, is compared with other beginnings of latent frames "
        "and with all frames. To repeat it:",
        "",
        _command("extensions", _kept(report), report, videos),
        "",
        markdown_table(
            ["measure", *WAYS],
            [[told, *(estimate(mean_interval(values[way][name])) for way in WAYS)] for name, told in CONTINUED.items()],
        ),
        "Goals for the extension: differences of 0 or less; undecided if the interval holds 0:",
        "",
        _goals({model_of(each): each for each in reports}),
        *map(_trained, reports[1:]),
        "The jump of the extension at the seam, less that between latent frames. Straight motion at normal speed reaches the picture's edge "
        "where the clip ends.",
        "",
        markdown_table(
            [
                "clips",
                "number",
                *JUMPS.values(),
            ],
            [[kind, str(int(rows.sum())), *_jumps(values["extension"], rows)] for kind, rows in kinds.items()],
        ),
    ]
    return "\n".join(lines)


def _goals(reports: Mapping[str, Report]) -> str:
    """The table of goals, with two columns for each model if there are several."""
    found = {model: goals(_by_way(balanced(report["videos"], "way"))) for model, report in reports.items()}
    title = "{}: difference" if len(found) > 1 else "difference"
    first = next(iter(found.values()))
    rows = [
        [goal, *(word for each in found.values() for word in (estimate(each[goal], signed=True), _decided(each[goal])))]
        for goal in first
    ]
    return markdown_table(["goal", *(word for model in found for word in (title.format(model), "met"))], rows)


def _trained(report: Report) -> str:
    """Which videos those of another model are."""
    count = _count(balanced(report["videos"], "way"))
    return (
        f"`{model_of(report)}` was trained to continue clips; {count} clips, {_made(report)[:-1]}, by `--model {model_of(report)} "
        f"--report {_kept(report)}`.\n"
    )


def goals(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Estimate]:
    """Differences that the goals want at 0 or less: jumps at the seam - between (latent) frames inside, and slopes - half of the chain's."""
    ours, chain = values["extension"], values["chain"]
    found = {
        f"{told}: seam - {inside}": paired_interval(ours[f"{name}_seam"], ours[f"{name}_{key}"])
        for key, inside in (("between", "latent frames"), ("inside", "all frames"))
        for name, told in JUMPS.items()
    }
    slopes = {"rgb_slope": "the object's", "background_rgb_slope": "the background's"}
    return found | {
        f"slope of {told} colour - half of the chain's": paired_interval(ours[name], chain[name] / 2)
        for name, told in slopes.items()
    }


def _by_way(videos: Sequence[Video]) -> dict[str, dict[str, np.ndarray]]:
    return {way: found for (way,), found in _by(videos, CONTINUED, "way").items()}


def balanced(videos: Sequence[Video], *names: str) -> list[Video]:
    """The videos of numbers that every combination of `names` and seed has, in the order of their number."""
    asked = {_key(video, "seed", *names) for video in videos}
    made: dict[int, set[tuple]] = {}
    for video in videos:
        made.setdefault(video["index"], set()).add(_key(video, "seed", *names))
    return sorted((video for video in videos if made[video["index"]] == asked), key=lambda video: video["index"])


def _by(videos: Sequence[Video], measures: Mapping[str, str], *names: str) -> dict[tuple, dict[str, np.ndarray]]:
    """[numbers] of each measure, seeds averaged first, by what the videos have under `names`."""
    numbers = sorted({video["index"] for video in videos})
    groups: dict[tuple, list[Video]] = {}
    for video in videos:
        groups.setdefault(_key(video, *names), []).append(video)
    return {
        key: {
            name: seed_means(((video["index"], video["values"][name]) for video in group), numbers) for name in measures
        }
        for key, group in groups.items()
    }


def _key(video: Video, *names: str) -> tuple:
    return tuple(video[name] for name in names)


def _kinds(videos: Sequence[Video]) -> dict[str, np.ndarray]:
    """Which of the numbers have each kind of clip, and which are as captioned."""
    kinds = dict(sorted((video["index"], video["kind"]) for video in videos if video["way"] == "extension"))
    found = {kind: np.array([each == kind for each in kinds.values()]) for kind in sorted(set(kinds.values()))}
    return found | {"all as captioned": np.array([each != WRONG for each in kinds.values()])}


def _jumps(found: Mapping[str, np.ndarray], rows: np.ndarray) -> list[str]:
    """Jumps at the seam less those between latent frames."""
    pairs = ((found[f"{name}_seam"][rows], found[f"{name}_between"][rows]) for name in JUMPS)
    return [estimate(paired_interval(*pair), signed=True) for pair in pairs]


def _count(videos: Sequence[Video]) -> int:
    return len({video["index"] for video in videos})


def _made(report: Report) -> str:
    settings = report["comparison"]["settings"]
    seeds = len({video["seed"] for video in report["videos"]})
    return (
        f"{settings['sampler.num_steps']} steps, guidance {settings['sampler.guidance_scale']:g}, {seeds} seed{'s' * (seeds > 1)}, "
        f"checkpoint `{settings['checkpoint']}`."
    )


def _kept(report: Report) -> str:
    """The file that the page has the report on continued videos from."""
    return f"docs/findings/{report_name('extensions', model_of(report))}/report.json"


def _command(benchmark: str, file: str, report: Report, videos: Sequence[Video]) -> str:
    """The command that makes these videos again."""
    settings = report["comparison"]["settings"]
    count, seeds = (1 + max(video[key] for video in videos) for key in ("index", "seed"))
    model = "" if model_of(report) == EMBEDDED else f"--model {model_of(report)} "
    return (
        f"    python -m benchmarks.{benchmark} {model}--count {count} --seeds {seeds} --steps {settings['sampler.num_steps']} "
        f"--guidance {settings['sampler.guidance_scale']:g} --report {file}"
    )


def _decided(found: Estimate) -> str:
    """Whether a difference is 0 or less, and whether its interval says so."""
    return _met(found.mean <= 0) + ", undecided" * bool(found.low < 0 < found.high)


def _met(holds: bool) -> str:
    return "met" if holds else "**missed**"
