"""What the benchmarks of the embedded models' videos share: their options, their file of one line per video, and their engine."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS
from engine.config import ModelConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.trees import finite_or_none
from engine.files.whole import write_json
from engine.load.checkpoint import open_checkpoint
from engine.presets import read_preset
from evaluation.comparison.store import CHECKPOINT_DIGITS
from evaluation.study.reports import report_name

Video = Mapping[str, Any]
"""What tells a video from the others of its file: its number, seed, steps and so on."""


MODELS = ("tiny/wan", "tiny/ltx")
"""The embedded models; the presets have their names, and reports that name none are of the first."""


def options(
    description: str | None, *, name: str, count: str, seeds: int, models: Sequence[str] = MODELS[:1]
) -> argparse.ArgumentParser:
    """The options of such a benchmark; `count` says what is counted, and `name` is that of its files in the folder of results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--count", type=int, default=40, help=count)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--guidance", type=float, default=2.5, help="the preset's 5 needs 20 steps")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl")
    parser.add_argument(
        "--report",
        type=Path,
        help=f"default benchmarks/results/{' or '.join(f'{report_name(name, model)}.json' for model in models)}; docs/findings has the page's",
    )
    parser.add_argument("--kept", type=Path, help="a report whose videos are not made again, and are in the new one")
    parser.set_defaults(name=name)
    return parser


def report_path(args: argparse.Namespace) -> Path:
    """The file of the report, by default one of its own for each model."""
    return args.report or RESULTS / f"{report_name(args.name, args.model)}.json"


def sampler_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a line says of the model, its weights and the sampler, from the options."""
    checkpoint = open_checkpoint(ModelConfig(path=args.model)).digest[:CHECKPOINT_DIGITS]
    return {"model": args.model, "checkpoint": checkpoint, "steps": args.steps, "guidance": args.guidance}


def make_missing(
    out: Path,
    sampler: Mapping[str, Any],
    videos: Iterable[Video],
    make: Callable[[LongVideoEngine, Video], dict[str, Any]],
    kept: Sequence[Video] = (),
) -> None:
    """Append a line, the video and what `make` finds in it, for each video that neither the file nor `kept` has."""
    made = read(out)
    videos = [{**video, **sampler} for video in videos if not any(_is_same(video, each) for each in kept)]
    left = [video for video in videos if not any(video.items() <= line.items() for line in made)]
    engine_settings = {name: sampler[name] for name in ("steps", "guidance", "model")}
    with open_engine(**engine_settings) as engine, out.open("a", encoding="utf-8") as file:
        for video in left:
            file.write(json.dumps(video | make(engine, video)) + "\n")
            file.flush()


def report_on(
    args: argparse.Namespace,
    videos: Iterable[Video],
    make: Callable[[LongVideoEngine, Video], dict[str, Any]],
    measured: Callable[[Sequence[Mapping[str, Any]]], Sequence[Video]],
    num_frames: Sequence[int],
) -> dict[str, Any]:
    """Make what is missing, and write and return the report on all lines with this model and sampler."""
    sampler = sampler_of(args)
    kept = read_kept(args.kept, sampler)
    make_missing(args.out, sampler, videos, make, kept)
    found = with_kept(measured(made_with(args.out, sampler)), kept)
    return write_report(report_path(args), found, num_frames, sampler)


def open_engine(steps: int, guidance: float, model: str = MODELS[0]) -> LongVideoEngine:
    """An embedded model with so many steps and this guidance scale, on the CPU."""
    settings = {"sampler.num_steps": steps, "sampler.guidance_scale": guidance}
    always = {"output.progress": "off", "model.device": "cpu"}
    return LongVideoEngine(read_preset(model.replace("/", "-"), settings=settings | always))


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none of a file that is not there yet."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def made_with(path: Path, sampler: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of the videos that were made with this model and sampler; those of an older version name no checkpoint."""
    return [line for line in read(path) if sampler.items() <= line.items()]


def read_kept(path: Path | None, sampler: Mapping[str, Any]) -> list[Video]:
    """The measured videos of a report; none without one. UserError for a report of another checkpoint or sampler."""
    if path is None:
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    found, wanted = (
        {name: value for name, value in settings.items() if name != "video.num_frames"}
        for settings in ({"model": MODELS[0], **report["comparison"]["settings"]}, _settings([], sampler))
    )
    if found != wanted:
        raise UserError(f"--kept {path} was made with {found}, and this run has {wanted}; leave it out")
    return [
        {**video, "values": {name: math.nan if x is None else x for name, x in video["values"].items()}}
        for video in report["videos"]
    ]


def with_kept(videos: Sequence[Video], kept: Sequence[Video]) -> list[Video]:
    """The videos, and those of `kept` that are not among them."""
    return [*videos, *(each for each in kept if not any(_is_same(video, each) for video in videos))]


def _is_same(video: Video, measured: Video) -> bool:
    """Whether a measured video is this one: equal in all names that both have, but for the values."""
    names = (video.keys() & measured.keys()) - {"values"}
    return all(video[name] == measured[name] for name in names)


def write_report(
    path: Path, videos: Sequence[Video], num_frames: Sequence[int], sampler: Mapping[str, Any]
) -> dict[str, Any]:
    """Write and return the report of measured videos: a section of docs/findings.md (evaluation/study/timelines_and_extensions.py)."""
    settings = _settings(num_frames, sampler)
    known = [{**video, "values": {name: finite_or_none(x) for name, x in video["values"].items()}} for video in videos]
    report = {"comparison": {"settings": settings}, "videos": known}
    write_json(path, report)
    return report


def _settings(num_frames: Sequence[int], sampler: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": sampler["model"],
        "checkpoint": sampler["checkpoint"],
        "video.num_frames": num_frames,
        "sampler.num_steps": sampler["steps"],
        "sampler.guidance_scale": sampler["guidance"],
    }
