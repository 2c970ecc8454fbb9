"""What a timeline of two events costs beside the plain prompt: whole denoising runs of the embedded models.

python -m benchmarks.timeline
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, environment, print_table, ratio, round_robin, spread, write
from engine.engine import LongVideoEngine
from launch.cli.parser import parse_run

MODELS = ("tiny-wan", "tiny-ltx")
FIRST, SECOND = "a red circle moves right over a blue background", "a yellow star moves right over a blue background"
TRANSITIONS = ("cut", "scene", "fade", "relay")
STEPS = 2  # one dual, one local


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Seconds of a run of 129 frames with the plain prompt and with each transition, and their ratios."""
    words = [
        f"--config=configs/{model}.yaml",
        f"--sampler.num_steps={STEPS}",
        "--method.freespec.domain=step",
        "--output.progress=off",
        "--model.device=cpu",
    ]
    config = parse_run(words, name="timeline", description="", add_arguments=lambda parser: None)[1]
    engine = LongVideoEngine(config)
    try:
        prompts = {"plain": FIRST} | {how: f"{FIRST} [0-4s] | {SECOND} [4s-, {how}]" for how in TRANSITIONS}
        for prompt in prompts.values():  # texts into the cache
            engine.denoise(prompt)
        runs = {name: lambda prompt=prompt: engine.denoise(prompt) for name, prompt in prompts.items()}
        times = round_robin(runs, engine.device, repeats)
    finally:
        engine.close()
    ratios = {
        f"{how} / plain": {key: ratio(times[how][key], times["plain"][key]) for key in ("wall_s", "cpu_s")}
        for how in TRANSITIONS
    }
    seconds = {name: {key: spread(values) for key, values in found.items()} for name, found in times.items()}
    return {"shape": model, "seconds": seconds, "ratios": ratios}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of which runs every variant once")
    parser.add_argument("--note", default="", help="what else the machine was doing; kept in the file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    where = environment(torch.device("cpu"), args.note)
    rows = [measure(model, args.repeats) for model in MODELS]
    print_table(
        ["model", *(f"{how} / plain" for how in TRANSITIONS)],
        [[row["shape"], *(f"{found['cpu_s']['median']:.3f}" for found in row["ratios"].values())] for row in rows],
    )
    where["load_average_end"] = os.getloadavg()[0]
    settings = {"dtype": "float32", "kernel": "auto", "repeats": args.repeats, "num_frames": 129, "num_steps": STEPS}
    print(f"wrote {write(args.results, 'timeline', where, settings, rows)}")


if __name__ == "__main__":
    main()
