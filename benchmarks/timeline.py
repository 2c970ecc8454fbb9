"""What a timeline of two events costs beside the plain prompt: whole denoising runs of the embedded models.

python -m benchmarks.timeline
"""

from typing import Any

import torch

from benchmarks import tables
from benchmarks.measure import over_and_under, parser, round_robin, run, spread
from engine.engine import LongVideoEngine
from engine.presets import read_preset

MODELS = ("tiny-wan", "tiny-ltx")
FIRST, SECOND = "a red circle moves right over a blue background", "a yellow star moves right over a blue background"
TRANSITIONS = ("cut", "scene", "fade", "relay")
STEPS = 2  # one dual, one local


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Seconds of a run of 129 frames with the plain prompt and with each transition, and their ratios."""
    settings = {"sampler.num_steps": STEPS, "method.freespec.domain": "step", "output.progress": "off"}
    with LongVideoEngine(read_preset(model, settings=settings | {"model.device": "cpu"})) as engine:
        prompts = {"plain": FIRST} | {how: f"{FIRST} [0-4s] | {SECOND} [4s-, {how}]" for how in TRANSITIONS}
        for prompt in prompts.values():  # texts into the cache
            engine.denoise(prompt)
        runs = {name: lambda prompt=prompt: engine.denoise(prompt) for name, prompt in prompts.items()}
        times = round_robin(runs, engine.device, repeats)
    ratios = {f"{how} / plain": over_and_under(times, how, "plain") for how in TRANSITIONS}
    seconds = {name: {key: spread(values) for key, values in found.items()} for name, found in times.items()}
    return {"shape": model, "seconds": seconds, "ratios": ratios}


def main() -> None:
    """Measure, print and write."""
    args = parser(__doc__, repeats=5).parse_args()
    torch.set_num_threads(1)  # models this small are slower on more, and their times vary more
    settings = {"num_frames": 129, "num_steps": STEPS}
    run("timeline", args, (measure(model, args.repeats) for model in MODELS), tables.timeline, settings)


if __name__ == "__main__":
    main()
