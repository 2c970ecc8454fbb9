"""demo.py: one prompt and seed, four times the native length, with each method, and one picture of all three."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.whole import describe_error
from engine.media.contact_sheet import Row, comparison, spaced, write_picture
from engine.media.read_video import read_video
from launch.arguments.demo import Arguments, read
from launch.commands.generate import find_stages
from launch.video.make import make_video, summary
from launch.video.outputs import OutputFiles, claim_outputs, plan_outputs, refuse_existing
from launch.video.prompts import look_at_prompts

NOTES = {"direct": "full attention", "sliding_window": "native window", "freespec": "both, fused"}


def main(argv: list[str]) -> None:
    """Read the command line and make the demonstration."""
    run(read(argv))


def run(given: Arguments) -> None:
    """Make the missing videos with one load of the model, then the picture."""
    config, folder, prompt = given.config, given.folder, given.prompt
    configs = {name: for_method(config, name, folder) for name in NOTES}
    outputs = {name: plan_outputs(each.output, 1)[0] for name, each in configs.items()}
    picture = folder / "comparison.png"
    paths = [picture, *(path for files in outputs.values() for path in files.all)]
    look_at_prompts(config, [("the prompt", prompt)])
    with claim_outputs(paths, flag="--out"), contextlib.ExitStack() as stack:
        stages = {name: find_stages([prompt], [files], configs[name])[0] for name, files in outputs.items()}
        left = [name for name, stage in stages.items() if stage != "finished"]
        if not left and picture.exists():
            return
        if not config.output.overwrite:
            refuse_existing([picture], "--output.overwrite")
        engine = stack.enter_context(contextlib.closing(LongVideoEngine(config))) if left else None
        records = {}
        for name, files in outputs.items():
            if name not in left or engine is None:
                records[name] = json.loads(files.record.read_text(encoding="utf-8"))
                continue
            chosen = configs[name]
            engine.use_method(chosen.method, chosen.output)
            replace = chosen.output.overwrite
            records[name] = make_video(engine, chosen, prompt, files, stage=stages[name], replace=replace)
            print(summary(records[name], files), flush=True)
        try:
            write_picture(picture, compare(records, outputs, num_columns=8), replace=config.output.overwrite)
        except OSError as error:
            raise UserError(
                f"{describe_error(error, picture)}; the videos are whole, and the same command makes the picture"
            ) from error
    print(f"{picture}: the three videos, one above the other")


def for_method(config: RunConfig, name: str, folder: Path) -> RunConfig:
    """The same run with another method, written to its own files."""
    return dataclasses.replace(
        config,
        method=dataclasses.replace(config.method, name=name),
        output=dataclasses.replace(config.output, path=str(folder / f"{name}.mp4")),
    )


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
