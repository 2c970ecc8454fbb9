"""What the benchmarks of the embedded model's videos share: their options, their file of one line per video, and their engine."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS
from engine.engine import LongVideoEngine
from launch.cli.parser import parse_run
from metrics.bootstrap import Estimate

Video = Mapping[str, Any]
"""What tells a video from the others of its file: its number, seed, steps and so on."""


def options(description: str | None, *, count: str, seeds: int, out: str) -> argparse.ArgumentParser:
    """The options of such a benchmark; `count` says what is counted, and `out` is the file in the folder of results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help=count)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / out)
    return parser


def make_missing(
    out: Path, steps: int, videos: Iterable[Video], make: Callable[[LongVideoEngine, Video], dict[str, Any]]
) -> None:
    """Append a line, the video and what `make` finds in it, for each video that the file has no line of."""
    made = read(out)
    videos = [{**video, "steps": steps} for video in videos]
    left = [video for video in videos if not any(video.items() <= line.items() for line in made)]
    with open_engine(steps) as engine, out.open("a", encoding="utf-8") as file:
        for video in left:
            file.write(json.dumps(video | make(engine, video)) + "\n")
            file.flush()


def open_engine(steps: int) -> LongVideoEngine:
    """The embedded Wan with so many steps, on the CPU."""
    words = ["--config=configs/tiny-wan.yaml", f"--sampler.num_steps={steps}", "--output.progress=off"]
    words.append("--model.device=cpu")
    return LongVideoEngine(parse_run(words, name="benchmark", description="", add_arguments=lambda _: None)[1])


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none of a file that is not there yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def show(estimate: Estimate, digits: int = 3) -> str:
    """A mean, and its interval if there is one."""
    ends = f" [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]" if np.isfinite(estimate.low) else ""
    return f"{estimate.mean:.{digits}f}{ends}"
