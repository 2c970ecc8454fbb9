"""demo.py: one prompt and seed, four times the native length, with each method, and one picture of all three."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import RunConfig
from engine.contact_sheet import Row, comparison, spaced, write_picture
from engine.engine import LongVideoEngine
from engine.read_video import read_video
from launch.arguments.demo import Arguments, read
from launch.commands.generate import make_video, summary
from launch.outputs import OutputFiles, claim_outputs, plan_outputs
from launch.prompts import look_at_prompts

NOTES = {"direct": "full attention", "sliding_window": "native window", "freespec": "both, fused"}


def main(argv: list[str]) -> None:
    """Read the command line and make the demonstration."""
    run(read(argv))


def run(given: Arguments) -> None:
    """Load the model once, make the three videos, then the picture."""
    config, folder = given.config, given.folder
    configs = {name: for_method(config, name, folder) for name in NOTES}
    outputs = {name: plan_outputs(each.output, 1)[0] for name, each in configs.items()}
    picture = folder / "comparison.png"
    paths = [picture, *(path for files in outputs.values() for path in files.all)]
    look_at_prompts(config, [("the prompt", given.prompt)])
    records = {}
    with claim_outputs(paths, flag="--folder"), contextlib.closing(LongVideoEngine(config)) as engine:
        for name, files in outputs.items():
            engine.use_method(configs[name].method, configs[name].output)
            records[name] = make_video(engine, configs[name], given.prompt, files, replace=True)
            print(summary(records[name], files))
        write_picture(picture, compare(records, outputs, num_columns=8))
    print(f"{picture}: the three videos, one above the other")


def for_method(config: RunConfig, name: str, folder: Path) -> RunConfig:
    """The same run with another method, written to its own files; what a former demonstration left is replaced."""
    return dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, name=name),
        output=dataclasses.replace(config.output, path=str(folder / f"{name}.mp4"), overwrite=True),
    )


def compare(records: dict[str, dict[str, Any]], outputs: dict[str, OutputFiles], *, num_columns: int) -> Any:
    """The picture of the videos at the same moments."""
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
