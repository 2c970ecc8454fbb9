"""Measure a checkpoint on combinations outside its training: `python -m tiny.evaluate wan`.

It writes `figures.json` beside the weights, and the model card from it. Every clip is made by the stock pipeline and read by
`tiny.measure`, which does not see the caption.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from tiny.card import write_card
from tiny.families import FAMILIES, Family
from tiny.families.base import NATIVE_FRAMES, load_pipeline
from tiny.measure import Reading, read, track
from tiny.state import numpy_rng
from tiny.train_vae import psnr, world_batch
from tiny.world import ORBITS, SIZE, STRAIGHT, Scene, caption, render, sample_scene

SEED = 4
NUM_STEPS = 20
GUIDANCE = 5.0
WORDS = ("shape", "colour", "size", "motion", "speed", "background", "pan")


def sample(
    family: Family,
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_frames: int = NATIVE_FRAMES,
    pictures: list[Image.Image] | None = None,
) -> np.ndarray:
    """One clip per prompt, float [B, F, SIZE, SIZE, 3] in levels 0..255; a pipeline of pictures begins each with one."""
    frames = pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_frames=num_frames,
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        **({} if pictures is None else {"image": pictures}),
        **family.sampling_arguments(),
    ).frames
    return 255 * frames


def evaluation_scenes(num_clips: int) -> list[tuple[Scene, str]]:
    """Held-out scenes with a caption each."""
    rngs = [numpy_rng(SEED, index) for index in range(num_clips)]
    scenes = [sample_scene(rng, held_out=True) for rng in rngs]
    return [(scene, caption(scene, rng)) for scene, rng in zip(scenes, rngs, strict=True)]


@torch.no_grad()
def reconstruction_psnr(pipe: DiffusionPipeline, num_clips: int) -> float:
    """Mean PSNR in dB over held-out clips of native length, encoded and decoded."""
    values = []
    for index in range(num_clips):
        video = world_batch(numpy_rng(SEED + 1, index), num_clips=1, num_frames=NATIVE_FRAMES, held_out=True)
        decoded = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mean, return_dict=False)[0]
        values.append(psnr(float((decoded - video).square().mean())))
    return float(np.mean(values))


def match_rates(scenes: list[Scene], readings: list[Reading]) -> dict[str, float]:
    """Share of clips, 0..1, whose reading agrees with the scene of the caption, word by word."""
    pairs = list(zip(scenes, readings, strict=True))
    agree = {word: [getattr(scene, word) == getattr(reading, word) for scene, reading in pairs] for word in WORDS}
    rates = {word: float(np.mean(values)) for word, values in agree.items()}
    rates["shape_and_colour"] = float(np.mean(np.logical_and(agree["shape"], agree["colour"])))
    for name, motions in (("straight", tuple(STRAIGHT)), ("orbit", tuple(ORBITS)), ("bounce", ("bounce",))):
        among = [hit for hit, scene in zip(agree["motion"], scenes, strict=True) if scene.motion in motions]
        rates[f"motion_of_{name}"] = float(np.mean(among)) if among else float("nan")
    return rates


def long_rates(
    family: Family, pipe: DiffusionPipeline, scenes: list[tuple[Scene, str]], num_frames: int
) -> dict[str, float]:
    """Share of frames, 0..1, with the captioned shape and colour in long clips of the stock pipeline."""
    hits = []
    for index, (scene, text) in enumerate(scenes):
        seen = track(sample(family, pipe, [text], [index], num_frames=num_frames)[0])
        pairs = zip(seen.shape, seen.colour, strict=True)
        hits.append(np.mean([pair == (scene.shape, scene.colour) for pair in pairs]))
    return {"frames": num_frames, "clips": len(scenes), "shape_and_colour_per_frame": float(np.mean(hits))}


@torch.no_grad()
def picture_rates(family: Family, pipe: DiffusionPipeline, scenes: list[tuple[Scene, str]], batch: int) -> dict:
    """`match_rates` of clips that begin with the first frame of their scene, and how well they show that frame (mean PSNR in dB)."""
    starts = [render(scene, 1)[0] for scene, _ in scenes]
    readings, values = [], []
    for first in tqdm(range(0, len(scenes), batch), desc="clips from pictures"):
        texts = [text for _, text in scenes[first : first + batch]]
        begun, seeds = starts[first : first + batch], list(range(first, first + len(texts)))
        clips = sample(family, pipe, texts, seeds, pictures=[Image.fromarray(start) for start in begun])
        readings += [read(clip) for clip in clips]
        values += [
            psnr(float(np.mean(((clip[0] - start) / 127.5) ** 2))) for clip, start in zip(clips, begun, strict=True)
        ]
    rates = match_rates([scene for scene, _ in scenes], readings)
    return {"clips": len(scenes), "first_frame_psnr_db": float(np.mean(values)), "matches": rates}


def evaluate(family: Family, folder: Path, *, num_clips: int, num_long: int, num_pictures: int, batch: int = 4) -> dict:
    """All figures of the checkpoint in `folder`."""
    pipe = load_pipeline(family, folder)
    pairs = evaluation_scenes(num_clips)
    readings: list[Reading] = []
    for start in tqdm(range(0, num_clips, batch), desc="clips"):
        texts = [text for _, text in pairs[start : start + batch]]
        seeds = list(range(start, start + len(texts)))
        readings += [read(clip) for clip in sample(family, pipe, texts, seeds)]
    failures = [
        {"caption": text, "seen": asdict(reading)}
        for (scene, text), reading in zip(pairs, readings, strict=True)
        if (scene.shape, scene.colour, scene.motion) != (reading.shape, reading.colour, reading.motion)
    ]
    figures = {
        "vae_psnr_db": reconstruction_psnr(pipe, 16),
        "clips": num_clips,
        "steps": NUM_STEPS,
        "guidance": GUIDANCE,
        "matches": match_rates([scene for scene, _ in pairs], readings),
        "long": long_rates(family, pipe, pairs[:num_long], 4 * NATIVE_FRAMES - 3),
        "failures": failures,
    }
    if family.picture_pipeline is not None:
        begins_with_picture = family.picture_pipeline(**pipe.components)
        begins_with_picture.set_progress_bar_config(disable=True)
        figures["pictures"] = picture_rates(family, begins_with_picture, pairs[:num_pictures], batch)
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES), help="which embedded model")
    parser.add_argument("--model", type=Path, help="its checkpoint (default: tiny/FAMILY)")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--long", type=int, default=4, help="clips of four times the native length")
    parser.add_argument(
        "--pictures", type=int, default=40, help="clips that begin with a picture, if the model learns them"
    )
    args = parser.parse_args()
    folder = args.model or Path(__file__).resolve().parent / args.family
    figures = evaluate(
        FAMILIES[args.family], folder, num_clips=args.clips, num_long=args.long, num_pictures=args.pictures
    )
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(args.family, folder)


if __name__ == "__main__":
    main()
