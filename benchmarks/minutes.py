"""Long videos of the embedded model, 4x, 8x and 16x its native length: CPU seconds per frame and peak memory.

python -m benchmarks.minutes

Each video is made in a process of its own, latents and file, as `launch/generate.py` makes it.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.measure import parser, run
from engine.engine import LongVideoEngine
from engine.media.write_video import open_video
from engine.presets import read_preset

FRAMES = (129, 257, 513)
FAR = ("480", "all")
PROMPT = "a small yellow star moves left quickly over a brown background"


def peak_mib() -> float:
    """The most resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def make(num_frames: int, far: str, steps: int) -> dict[str, Any]:
    """Make one video; CPU seconds of denoising and of decoding into a file, and peak memory after each stage."""
    settings = {"video.num_frames": num_frames, "sampler.num_steps": steps, "attention.far": far}
    config = read_preset("tiny-wan", settings={**settings, "output.progress": "off", "model.device": "cpu"})
    with LongVideoEngine(config) as engine, tempfile.TemporaryDirectory() as folder:
        peaks, clock = {"loaded": peak_mib()}, [time.process_time()]
        denoised = engine.denoise(PROMPT)
        peaks["denoised"] = peak_mib()
        clock.append(time.process_time())
        size = {"fps": config.video.fps, "height": config.video.height, "width": config.video.width, "crf": 12}
        with open_video(Path(folder) / "video.mp4", kind="mp4", **size) as video:
            for frames in engine.decode(denoised.latents):
                video.write(frames)
        peaks["decoded"] = peak_mib()
        clock.append(time.process_time())
    return {
        "frames": num_frames,
        "far": far,
        "latent_frames": denoised.latents.shape[2],
        "steps": {mode: sum(step["mode"] == mode for step in denoised.steps) for mode in ("dual", "local")},
        "denoise_cpu_s": clock[1] - clock[0],
        "decode_cpu_s": clock[2] - clock[1],
        "latents_mib": denoised.latents.nbytes / 2**20,
        "peak_mib": peaks,
    }


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every length with every setting of far keys, each in a new process, since peaks do not fall."""
    spawn = multiprocessing.get_context("spawn")
    for far in FAR:
        for num_frames in args.frames:
            with spawn.Pool(1) as pool:
                yield pool.apply(make, (num_frames, far, args.steps))


def main() -> None:
    """Measure, print and write."""
    options = parser(__doc__, repeats=1)
    options.add_argument("--frames", nargs="+", type=int, default=list(FRAMES), help="lengths of the videos")
    options.add_argument("--steps", type=int, default=4, help="denoising steps of each")
    args = options.parse_args()
    run("minutes", args, measured(args), tables.minutes, {"steps": args.steps, "prompt": PROMPT})


if __name__ == "__main__":
    main()
