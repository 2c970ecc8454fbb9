"""demo.py: one prompt and seed, four times the native length, with each method, one picture of all three, and a timeline."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.whole import describe_error
from engine.load.checkpoint import open_checkpoint
from engine.media.contact_sheet import Row, comparison, spaced, write_picture
from engine.media.read_video import read_video
from engine.shown import quoted
from launch.arguments.demo import Arguments
from launch.video.make import make_video, summary
from launch.video.outputs import OutputFiles, claim_outputs, plan_outputs, refuse_existing
from launch.video.prompts import look_at_prompts
from launch.video.remaining import find_stages

NOTES = {"direct": "full attention", "sliding_window": "native window", "freespec": "both, fused"}
TIMELINE = "timeline"
# The texts of the timeline's events, each half of its video.
EVENTS = ("a red circle moves right over a blue background", "a yellow star moves right over a blue background")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One video of the demonstration."""

    config: RunConfig
    prompt: str
    files: OutputFiles


def run(given: Arguments) -> None:
    """Make the missing videos with one load of the model, then the picture, and describe them."""
    overwrite = given.config.output.overwrite
    videos = plan_videos(given)
    picture = given.folder / "comparison.png"
    look_at_prompts(given.config, [("the prompt", given.prompt)])
    look_at_prompts(videos[TIMELINE].config, [("the timeline", videos[TIMELINE].prompt)])
    with (
        claim_outputs([picture, *(path for video in videos.values() for path in video.files.all)], flag="--out"),
        contextlib.ExitStack() as stack,
    ):
        stages = {name: find_stages([each.prompt], [each.files], each.config)[0] for name, each in videos.items()}
        left = [name for name, stage in stages.items() if stage != "finished"]
        is_drawn = picture.exists() and not set(left) & set(NOTES)
        if not is_drawn and not overwrite:
            refuse_existing([picture], "--output.overwrite")
        records = {}
        if left:
            engine = stack.enter_context(LongVideoEngine(given.config))
        for name, video in videos.items():
            if name not in left:
                records[name] = json.loads(video.files.record.read_text(encoding="utf-8"))
                continue
            engine.use_method(video.config.method, video.config.output)
            records[name] = make_video(
                engine, video.config, video.prompt, video.files, stage=stages[name], replace=overwrite
            )
            print(summary(records[name], video.files), flush=True)
        if not is_drawn:
            draw(picture, records, {name: videos[name].files for name in NOTES}, replace=overwrite)
            print(f"{picture}: the three videos, one above the other")
    if TIMELINE in left:
        print(describe_timeline(records[TIMELINE], videos[TIMELINE].files))


def plan_videos(given: Arguments) -> dict[str, Planned]:
    """The video of each method, by its name, and that of the timeline, which is half as long."""
    config = given.config
    videos = {name: (given.prompt, for_method(config, name, name, given.folder)) for name in NOTES}
    spec, size = open_checkpoint(config.model).spec, config.video
    latents = spec.latent_shape(size.num_frames, size.height, size.width)[2]
    half = dataclasses.replace(size, num_frames=spec.num_frames(max(-(-latents // 2), len(EVENTS))))
    middle = half.num_frames // 2
    # A scene has no width, so that it fits into a video of any length.
    text = f"{EVENTS[0]} [0-{middle}] | {EVENTS[1]} [{middle}-, scene]"
    directed = for_method(dataclasses.replace(config, video=half), "freespec", TIMELINE, given.folder)
    return {
        name: Planned(config=chosen, prompt=prompt, files=plan_outputs(chosen.output, 1)[0])
        for name, (prompt, chosen) in (videos | {TIMELINE: (text, directed)}).items()
    }


def for_method(config: RunConfig, method: str, name: str, folder: Path) -> RunConfig:
    """The same run with another method, written to files of this name."""
    return dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, name=method),
        output=dataclasses.replace(config.output, path=str(folder / f"{name}.mp4")),
    )


def draw(picture: Path, records: dict[str, dict[str, Any]], outputs: dict[str, OutputFiles], *, replace: bool) -> None:
    """Write the picture of the three videos; UserError if it cannot be written."""
    try:
        write_picture(picture, compare(records, outputs, num_columns=8), replace=replace)
    except OSError as error:
        raise UserError(
            f"{describe_error(error, picture)}; the videos are whole, and the same command makes the picture"
        ) from error


def describe_timeline(record: dict[str, Any], files: OutputFiles) -> str:
    """Describe the contact sheet of the timeline: each text and when it starts."""
    first, *others = record["timeline"]
    fps = record["video"]["fps"]
    then = "".join(f", and from {event['start'] / fps:.1f} s on {quoted(event['text'])}" for event in others)
    return f"{files.sheet}: the timeline, {quoted(first['text'])}{then}"


def compare(records: dict[str, dict[str, Any]], outputs: dict[str, OutputFiles], *, num_columns: int) -> Any:
    """Draw the videos at the same times."""
    record = next(iter(records.values()))
    fps, num_frames = record["video"]["fps"], record["video"]["num_frames"]
    moments = spaced(num_frames, num_columns)
    rows = [
        Row(
            name=name,
            note=f"{NOTES[name]}, {records[name]['seconds']['denoise']:.0f} s",
            frames=pick_frames(files.video, moments),
        )
        for name, files in outputs.items()
    ]
    latents, native = record["latents"]["shape"][2], record["config"]["method"]["window_frames"]
    subtitle = f"{num_frames} frames: {latents} latent frames, native are {native}; seed {record['seed']}"
    return comparison(rows, [i / fps for i in moments], title=record["prompt"], subtitle=subtitle, width=1300)


def pick_frames(video: Path, indices: list[int]) -> list[np.ndarray]:
    """Frames of a file by number."""
    wanted = set(indices)
    return [frame for i, frame in enumerate(read_video(video)) if i in wanted]
