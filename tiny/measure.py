"""Measures a clip of the world without knowing its caption: what moves in it, where, how, and over what.

Nothing here is learned. The background is the median colour of a frame, the object is what stands out from it, its shape is the
best overlap with the world's own shapes, and its place is a circular mean, since the picture is a torus. Units as in `tiny.world`.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tiny.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    SPEEDS,
    TEXTURES,
    UNIT_AREAS,
    coverage,
)

MIN_CONTRAST = 60.0
"""Distance in RGB levels from the background colour at which a pixel belongs to an object; textures stay below 32."""

MIN_AREA = 40.0
"""Square pixels below which a frame counts as empty; the smallest shape has 213."""

SMALL_BELOW = 310.0
"""Square pixels between the small shapes (213 to 284) and the large ones (360 to 479)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """What is seen in each of F frames. Frames without an object hold NaN, and "" for the names of shape and colour."""

    shape: tuple[str, ...]
    overlap: np.ndarray
    """[F] intersection over union with the best shape, 1 is perfect."""
    colour: tuple[str, ...]
    rgb: np.ndarray
    """[F, 3] mean colour of the object, levels 0..255."""
    area: np.ndarray
    """[F] square pixels."""
    centre: np.ndarray
    """[F, 2] pixels as (x, y), unwrapped: it goes on counting where the object re-enters at the other edge."""
    background: tuple[str, ...]
    background_rgb: np.ndarray
    """[F, 3] median colour, levels 0..255."""
    pan: np.ndarray
    """[F] how far the camera has gone to the right since frame 0, in pixels; NaN where no texture is seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a whole clip shows, in the words of `tiny.world.Scene`; "" or "still" where there is nothing to tell."""

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    background: str
    pan: str
    pixels_per_frame: float


def track(clip: np.ndarray) -> Track:
    """Measures every frame of a clip [F, SIZE, SIZE, 3], levels 0..255 of any dtype."""
    clip = np.asarray(clip, dtype=np.float64)
    if clip.ndim != 4 or clip.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"a clip is [F, {SIZE}, {SIZE}, 3], not {list(clip.shape)}")
    background_rgb = np.median(clip, axis=(1, 2))
    background = _nearest(background_rgb, BACKGROUNDS)
    alpha, rgb = _separate(clip, background_rgb)
    area = alpha.sum((1, 2))
    centre = _circular_mean(alpha)
    shape, overlap = _best_shapes(alpha, area, centre)
    colour = _nearest(rgb, COLOURS)
    empty = area < MIN_AREA
    for values in (overlap, rgb, centre):
        values[empty] = np.nan
    return Track(
        shape=_blank(shape, empty),
        overlap=overlap,
        colour=_blank(colour, empty),
        rgb=rgb,
        area=area,
        centre=_unwrap(centre, SIZE),
        background=background,
        background_rgb=background_rgb,
        pan=_pan(clip, alpha, _majority(background)),
    )


def read(clip: np.ndarray) -> Reading:
    """Tells what a clip [F, SIZE, SIZE, 3] shows: the most frequent names, and the motion of the whole track."""
    seen = track(clip)
    motion, pixels_per_frame = motion_of(seen.centre)
    area = np.median(seen.area)
    empty = not any(seen.shape)
    pan = np.nanmedian(np.diff(seen.pan)) if np.isfinite(np.diff(seen.pan)).any() else 0.0
    return Reading(
        shape=_majority(seen.shape),
        colour=_majority(seen.colour),
        size="" if empty else "small" if area < SMALL_BELOW else "large",
        motion=motion,
        speed="" if empty else min(SPEEDS, key=lambda name: abs(SPEEDS[name] - pixels_per_frame)),
        background=_majority(seen.background),
        pan="right" if pan > 0.4 else "left" if pan < -0.4 else "none",
        pixels_per_frame=pixels_per_frame,
    )


def motion_of(centre: np.ndarray) -> tuple[str, float]:
    """(name of the motion, typical speed in pixels per frame) of an unwrapped track [F, 2]; frames may be NaN.

    An orbit turns a little in most frames, a bounce turns its back on an axis at once, all else goes straight.
    """
    step = centre[2:] - centre[:-2]
    step = step[np.isfinite(step).all(1)]
    if len(step) < 6:
        return "still", 0.0
    length = np.hypot(*step.T)
    speed = float(np.median(length)) / 2
    if speed < 0.25:
        return "still", speed
    before, after = step[:-2], step[2:]
    turn = np.arctan2(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0], (before * after).sum(1))
    # y grows downwards, so a positive angle is a clockwise turn.
    if abs(np.median(turn)) > np.deg2rad(5):
        return ("clockwise" if np.median(turn) > 0 else "counterclockwise"), speed
    clearly = 0.3 * np.median(length)
    if (((step > clearly).sum(0) >= 2) & ((step < -clearly).sum(0) >= 2)).any():
        return "bounce", speed
    x, y = step.mean(0)
    if abs(x) > abs(y):
        return ("right" if x > 0 else "left"), speed
    return ("down" if y > 0 else "up"), speed


def _separate(clip: np.ndarray, background_rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of each pixel the object covers [F, H, W], colour of the object [F, 3]) by unmixing two colours."""
    offset = clip - background_rgb[:, None, None]
    contrast = np.linalg.norm(offset, axis=-1)
    seen = contrast > MIN_CONTRAST
    peak = np.array([np.quantile(c[s], 0.9) if s.any() else np.inf for c, s in zip(contrast, seen, strict=True)])
    # Only the inside tells the colour: pixels of the outline are mixed with the background.
    core = seen & (contrast > 0.8 * peak[:, None, None])
    weight = np.maximum(core.sum((1, 2)), 1)[:, None]
    colour_offset = (offset * core[..., None]).sum((1, 2)) / weight
    power = np.maximum((colour_offset**2).sum(-1), MIN_CONTRAST**2)
    alpha = np.clip(np.einsum("fhwc,fc->fhw", offset, colour_offset) / power[:, None, None], 0, 1)
    # Another colour that happens to lie on the way is no part of the object.
    stray = np.linalg.norm(offset - alpha[..., None] * colour_offset[:, None, None], axis=-1) > 1.5 * MIN_CONTRAST
    return np.where((alpha < 0.35) | stray, 0.0, alpha), background_rgb + colour_offset


def _circular_mean(alpha: np.ndarray) -> np.ndarray:
    """Centres [F, 2] in 0..SIZE of weights [F, H, W] on the torus; any number where all weights are 0."""
    wave = np.exp(2j * np.pi * (np.arange(SIZE) + 0.5) / SIZE)
    moments = np.stack([alpha.sum(1) @ wave, alpha.sum(2) @ wave], axis=1)
    rough = np.angle(moments) % (2 * np.pi) * SIZE / (2 * np.pi)
    # A circular mean leans to the longer side of a triangle; the plain mean of offsets from it does not.
    offset = (np.arange(SIZE) + 0.5 - rough[..., None] + SIZE / 2) % SIZE - SIZE / 2
    profile = np.stack([alpha.sum(1), alpha.sum(2)], axis=1)
    return rough + (profile * offset).sum(-1) / np.maximum(profile.sum(-1), 1e-9)


def _best_shapes(alpha: np.ndarray, area: np.ndarray, centre: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """(name of the shape with the best overlap, that overlap [F]), each shape tried at the measured place and area."""
    overlaps = []
    for shape in SHAPES:
        radius = np.sqrt(np.maximum(area, 1) / UNIT_AREAS[shape])[:, None, None]
        template = coverage(shape, radius, centre)
        overlaps.append(np.minimum(alpha, template).sum((1, 2)) / np.maximum(alpha, template).sum((1, 2)))
    best = np.argmax(overlaps, axis=0)
    return tuple(SHAPES[index] for index in best), np.max(overlaps, axis=0)


def _pan(clip: np.ndarray, alpha: np.ndarray, background: str) -> np.ndarray:
    """Camera positions [F] from the phase of the background's main wave, seen around the object."""
    kx, ky, level = TEXTURES[background][0]
    near = alpha > 0
    for axis, shift in ((1, 1), (1, -1), (2, 1), (2, -1), (1, 2), (1, -2), (2, 2), (2, -2)):
        near = near | np.roll(alpha > 0, shift, axis)
    weight = (~near).astype(np.float64)
    total = np.maximum(weight.sum((1, 2)), 1)
    light = clip.mean(-1)
    light = (light - ((light * weight).sum((1, 2)) / total)[:, None, None]) * weight
    pixel = np.arange(SIZE) + 0.5
    wave = np.exp(-2j * np.pi * (kx * pixel[None, :] + ky * pixel[:, None]) / SIZE)
    moment = (light * wave).sum((1, 2)) / total
    phase = np.where(np.abs(moment) > 0.15 * level, np.angle(moment), np.nan)
    place = _unwrap((phase * SIZE / (2 * np.pi * kx))[:, None], SIZE / kx)[:, 0]
    return place - (place[np.isfinite(place)][0] if np.isfinite(place).any() else 0.0)


def _unwrap(values: np.ndarray, period: float) -> np.ndarray:
    """Removes jumps of a period over time from [F, d]; rows with NaN stay, and are stepped over."""
    unwrapped = values.copy()
    finite = np.isfinite(values).all(1)
    unwrapped[finite] = np.unwrap(values[finite], period=period, axis=0)
    return unwrapped


def _nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> tuple[str, ...]:
    """The name of the nearest colour for each row of [F, 3]."""
    distance = np.linalg.norm(rgb[:, None] - np.array(list(names.values())), axis=-1)
    return tuple(list(names)[index] for index in distance.argmin(1))


def _blank(names: tuple[str, ...], empty: np.ndarray) -> tuple[str, ...]:
    """The names, with "" for empty frames."""
    return tuple("" if blank else name for name, blank in zip(names, empty, strict=True))


def _majority(names: tuple[str, ...]) -> str:
    """The most frequent name that is not "", or "" if there is none."""
    counts = Counter(name for name in names if name)
    return counts.most_common(1)[0][0] if counts else ""
