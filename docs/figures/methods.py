"""Draw docs/figures/methods.webp, one prompt and seed with three methods side by side: `python docs/figures/methods.py`.

The case is chosen from the kept measures of 40 prompts x 2 seeds: the one in which freespec gains most on both other methods at once
(`choose`). It is not an average; docs/findings.md has those.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine import LongVideoEngine, read_preset, write_video

FOLDER = Path(__file__).parent
KEPT = FOLDER.parent / "findings/videos.jsonl"
METHODS = {"direct": "full attention", "sliding_window": "native window", "freespec": "both, fused"}
SIDE, GAP, HEADER = 224, 12, 44


def choose() -> tuple[str, int]:
    """Prompt and seed with the largest min(speed error of direct - freespec, frames kept by freespec - sliding_window)."""
    header, *lines = map(json.loads, KEPT.read_text().splitlines())
    measures = {tuple(line["video"]): dict(zip(header["measures"], line["values"], strict=True)) for line in lines}

    def gain(case: tuple[int, int]) -> float:
        direct, sliding, freespec = (measures[name, *case] for name in METHODS)
        kept = [min(each["shape_kept"], each["colour_kept"]) for each in (freespec, sliding)]
        return min(direct["speed_error"] - freespec["speed_error"], kept[0] - kept[1])

    index, seed = max((case for name, *case in measures if name == "direct"), key=gain)
    return header["prompts"][f"p{index:04d}"], seed


def draw_methods(path: Path, prompt: str, seed: int) -> None:
    """Make the three videos with one load of the model and write them as one animation."""
    config = read_preset("tiny-wan")
    videos = []
    with LongVideoEngine(config) as engine:
        for name in METHODS:
            engine.use_method(dataclasses.replace(config.method, name=name))
            videos.append(engine.generate(prompt, seed=seed).frames)
    frames = np.stack([draw_frame(pictures) for pictures in zip(*videos, strict=True)])
    write_video(path, frames, fps=config.video.fps, crf=20)


def draw_frame(pictures: tuple[np.ndarray, ...]) -> np.ndarray:
    """One frame of each video in a row, under its method's name."""
    frame = Image.new("RGB", (len(pictures) * (SIDE + GAP) + GAP, HEADER + SIDE + GAP), "white")
    draw = ImageDraw.Draw(frame)
    for i, ((name, note), picture) in enumerate(zip(METHODS.items(), pictures, strict=True)):
        x = GAP + i * (SIDE + GAP)
        frame.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, HEADER))
        draw.text((x, HEADER - 10), name, "black", ImageFont.load_default(17), anchor="ls")
        draw.text((x + SIDE, HEADER - 10), note, "gray", ImageFont.load_default(13), anchor="rs")
    return np.asarray(frame)


if __name__ == "__main__":
    draw_methods(FOLDER / "methods.webp", *choose())
