"""A batch's folder with real, tiny videos and sidecars as launch/batch.py writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.files.whole import file_sha256
from engine.media.write_video import open_video

PROMPTS = ("a red circle", "a blue | square")
SIZE = 32
# Settings of freespec as every sidecar has them, whatever its method.
SWITCHES = {"basis": "local", "rank": True, "time": True, "residual": "time", "alpha": 5.0}
FPS = 4


def write_video(path: Path, *, num_frames: int = 21, fps: int = FPS, seed: int = 0) -> Path:
    """A pan whose texture and speed come from `seed`: at 4 frames a second, 21 frames are three clips of 2 s."""
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(0, 256, (8, 40, 3), dtype=np.uint8), np.ones((4, 4, 1), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_video(path, fps=fps, height=SIZE, width=SIZE, crf=20) as video:
        video.write(np.stack([texture[:, (1 + seed % 3) * t % 120 :][:, :SIZE] for t in range(num_frames)]))
    return path


def write_sidecar(video: Path, **changes: Any) -> Path:
    """The sidecar of a finished video, with some of its facts changed."""
    prompt_id, _, seed = video.stem.partition("-s")
    number = int(prompt_id[1:])
    tree = {
        "schema": 1,
        "status": "done",
        "item_id": "0" * 16,
        "config_id": video.parent.parent.name,
        "method": video.parent.parent.parent.name,
        "prompt_id": prompt_id,
        "line": number + 1,
        "prompt": PROMPTS[number],
        "seed": int(seed),
        "output": {"file": video.name, "bytes": video.stat().st_size, "sha256": file_sha256(video)},
        "video": {"native_frames": 9},
        "run": {"config": {"model": {"path": "tiny/wan"}, "method": {"freespec": SWITCHES, "name": "freespec"}}},
    } | changes
    path = video.with_suffix(".json")
    path.write_text(json.dumps(tree))
    return path


def make_batch(
    root: Path, *, methods: tuple[str, ...] = ("direct", "sliding_window"), seeds: tuple[int, ...] = (0, 7)
) -> Path:
    """Every method with every prompt and seed."""
    for place, method in enumerate(methods):
        for number in range(len(PROMPTS)):
            for seed in seeds:
                path = root / method / f"{place:012x}" / "videos" / f"p{number:04d}-s{seed}.mp4"
                write_sidecar(write_video(path, seed=100 * place + 10 * number + seed))
    return root
