"""The model card, written from the measured figures, so that it cannot claim what was not measured."""

import json
from pathlib import Path

from tiny.families import FAMILIES
from tiny.families.base import LATENT_FRAMES, NATIVE_FRAMES, TEXT_LENGTH
from tiny.world import BACKGROUNDS, COLOURS, SHAPES, SIZE, VOCABULARY

_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# A text-to-video model of 11 MB

The classes of {title} ({classes}) at a hundredth of their size,
trained from nothing on the procedural world of `tiny/world.py`: one coloured shape that moves over a softly textured background.
It is there so that long-video methods can be seen, and *measured*, in a minute on a laptop without a download.

```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("tiny/{family}", dtype=torch.float32)
video = pipe(
    "a red circle bounces over a blue background",
    height={size},
    width={size},
    num_frames={native},
    num_inference_steps={steps},
    guidance_scale={guidance:g},
{arguments}
).frames[0]
```

## What it knows
- {size} x {size} pixels, {native} frames ({latent_frames} latent frames of {grid}; 64 tokens each). Straight motion runs on a torus: what leaves at one
  edge enters at the other, so longer clips have a right answer too. A motion begins where there is room for it: what goes right, on the left.
- English captions like `a small green star moves to the left over a gray background, the camera pans right`.
  Shapes: {shapes}. Colours: {colours}. Backgrounds: {backgrounds}. Unsaid, an object is large and its speed normal.
- All its words: {words}. Any other word is read as `<unk>` and passed over.
- Directions are meant as seen in the picture, also while the camera pans.
- Text padded to {text} tokens is what it saw most; the pipeline's default of {long_text} was one training step in eight.
{given}
## How good it is
Measured by `python -m tiny.evaluate {family}` on {clips} held-out captions (combinations of shape, colour and motion never trained on), {steps} steps,
guidance {guidance:g}, read by `tiny/measure.py`, which does not know the caption.

| figure | value |
|---|---|
{rows}

{failures}

## How it was trained
`python -m tiny.train {family}`, without any pretrained part and without any data but the renderer's.

| stage | steps | minutes | device |
|---|---|---|---|
{stages}

Minutes are wall-clock, and the machine was shared with other work. Rendering and encoding the clips in between is not counted.
{history}Weights are stored in bfloat16 and are meant to be loaded in float32.

## Limits
The goals for this model are 90 % for shape and colour, 80 % for directions and 30 dB; where the table is below, it needs more training.
It is a toy: one object, {num_shapes} shapes, no grammar beyond its captions, nothing of the real world. Clips longer than {native} frames are out
of what it was trained on and degrade, which is what it is for.{bounces}
"""

_GIVEN = """- Videos that begin with a picture (`{}`, `--given first=FILE`), and videos that continue another (`--extend FILE`).
"""
"""For a model that learns to continue given frames."""

_ARCS = """ Bounces are its hardest motion: it turns back at a wall in an arc, and the measure,
which wants the turn at once, counts that as circling."""
"""For a model with less than half of its bounces recognised."""

_HISTORY = {
    "ltx": """The first two stages began with the weights of an earlier training, of 3,500 and 5,000 steps, which are not counted; the decoder
had 3,000 steps of short clips and 1,300 of the native length.
The first latent frames of 30 % of the clips were given, without noise and at timestep 0: one, as of a picture, in half of them, otherwise 1 to 8.
"""
}
"""Notes on training runs that differ from one run of the plan."""

_ROWS = (
    ("shape and colour as captioned", "shape_and_colour"),
    ("shape", "shape"),
    ("colour", "colour"),
    ("size", "size"),
    ("motion (7 kinds)", "motion"),
    ("straight motion: right direction", "motion_of_straight"),
    ("orbit: right sense", "motion_of_orbit"),
    ("bounce", "motion_of_bounce"),
    ("speed (2 kinds)", "speed"),
    ("background", "background"),
    ("camera pan", "pan"),
)

_STAGES = (
    ("vae", "autoencoder"),
    ("flow", "transformer and text encoder"),
    ("decoder", "decoder alone, once more"),
)


def write_card(name: str, folder: Path) -> None:
    """Write `README.md` in a checkpoint of the family `name` that holds `figures.json` and `training.json`."""
    family = FAMILIES[name]
    figures = json.loads((folder / "figures.json").read_text())
    record = json.loads((folder / "training.json").read_text())
    rows = [f"| {label} | {100 * figures['matches'][key]:.0f} % |" for label, key in _ROWS]
    rows.append(f"| reconstruction by the autoencoder | {figures['vae_psnr_db']:.1f} dB PSNR |")
    long = figures["long"]
    rows.append(
        f"| {long['frames']} frames, no method: frames with the captioned shape and colour ({long['clips']} clips) "
        f"| {100 * long['shape_and_colour_per_frame']:.0f} % |"
    )
    if "pictures" in figures:
        pictures = figures["pictures"]
        begun = f"begun with a picture ({pictures['clips']} clips)"
        rows += [
            f"| {begun}: {label} | {100 * pictures['matches'][key]:.0f} % |"
            for label, key in _ROWS
            if key in ("shape_and_colour", "motion")
        ]
        rows.append(f"| {begun}: first frame against the picture | {pictures['first_frame_psnr_db']:.1f} dB PSNR |")
    count = len(figures["failures"])
    card = _CARD.format(
        family=name,
        title=family.title,
        classes=", ".join(f"`{word}`" for word in family.classes),
        pipeline=family.pipeline.__name__,
        arguments="\n".join(f"    {key}={value}," for key, value in family.sampling_arguments().items()),
        history=_HISTORY.get(name, ""),
        given=_GIVEN.format(family.picture_pipeline.__name__) if family.picture_pipeline else "",
        bounces=_ARCS if figures["matches"]["motion_of_bounce"] < 0.5 else "",
        grid="{} x {}".format(*family.latent_grid),
        size=SIZE,
        native=NATIVE_FRAMES,
        latent_frames=LATENT_FRAMES,
        text=TEXT_LENGTH,
        long_text=family.pipeline_text_length,
        shapes=", ".join(SHAPES),
        num_shapes=len(SHAPES),
        colours=", ".join(COLOURS),
        backgrounds=", ".join(BACKGROUNDS),
        words=", ".join(f"`{word}`" for word in VOCABULARY),
        rows="\n".join(rows),
        failures=f"{count} of {figures['clips']} clips miss shape, colour or motion; `figures.json` lists them with what was seen.",
        stages="\n".join(
            f"| {label} | {record[key]['steps']} | {record[key]['minutes']} | {record[key]['device']} |"
            for key, label in _STAGES
            if key in record
        ),
        clips=figures["clips"],
        steps=figures["steps"],
        guidance=figures["guidance"],
    )
    (folder / "README.md").write_text(card)
