"""Exact measures of a clip of the embedded world: what moves, whether it stays itself, and where it goes.

The only file here that knows more than arrays: `tiny.measure` reads a clip without knowing its caption, `tiny.captions`
reads the caption. Positions are pixels of a torus of 64, unwrapped; frames in which no object is seen are handled by
each measure as its docstring says, and their share is a measure of its own, so that a video cannot score by losing its
object.
"""

from dataclasses import dataclass

import numpy as np

from tiny.captions import Told, parse_caption
from tiny.measure import Track, motion_of, track
from tiny.world import SIZE, SPEEDS, STRAIGHT

QUIET_STEP = 0.1
"""Pixels per frame: steps that vary less than this around their mean are an even straight path."""

WORLD_UNITS = {
    "object_seen": "share of frames",
    "shape_kept": "share of frames",
    "colour_kept": "share of frames",
    "rgb_drift": "levels",
    "shape_as_captioned": "share of frames",
    "colour_as_captioned": "share of frames",
    "motion_as_captioned": "share of videos",
    "background_as_captioned": "share of frames",
    "background_drift": "levels",
    "path_roughness": "px/frame²",
    "distance_travelled": "px",
    "speed": "px/frame",
    "speed_error": "px/frame",
    "repetition": "correlation",
    "repetition_straight": "correlation",
}
"""Every measure of `world_metrics`, with its unit."""


def why_not_world(prompts: list[str], height: int, width: int) -> str | None:
    """None if these videos can be measured as clips of the world; otherwise the reason, as a sentence.

    What counts is what is asked for, captions of the world at its size, and not which checkpoint answers.
    """
    if (height, width) != (SIZE, SIZE):
        return f"frames of the world are {SIZE} x {SIZE} pixels, these are {height} x {width}"
    strange = next((prompt for prompt in prompts if parse_caption(prompt) is None), None)
    return None if strange is None else f"this prompt is no caption of the world: {strange!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldReading:
    """Measures of one video by name (`WORLD_UNITS`), and per clip the share of frames that keep identity."""

    values: dict[str, float]
    identity_by_clip: list[float]


def world_metrics(frames: np.ndarray, prompt: str, native_frames: int) -> WorldReading:
    """Measures of frames [T, 64, 64, 3] (levels 0..255) that were asked for with `prompt`, a caption of the world.

    `native_frames` is the number of frames that the model was trained on. ValueError if the prompt is no caption.
    """
    told = parse_caption(prompt)
    if told is None:
        raise ValueError(f"{prompt!r} is no caption of the world")
    return measure_track(track(frames), told, native_frames)


def measure_track(seen: Track, told: Told, native_frames: int) -> WorldReading:
    """`world_metrics` of a track [F] that has been read already."""
    motion, speed = motion_of(seen.centre)
    repeated = repetition(seen.centre, native_frames)
    there = np.array([bool(name) for name in seen.shape])
    values = {
        "object_seen": float(there.mean()),
        **identity(seen, native_frames),
        "shape_as_captioned": _share(seen.shape, told.shape),
        "colour_as_captioned": _share(seen.colour, told.colour),
        "motion_as_captioned": float(motion == told.motion),
        "background_as_captioned": _share(seen.background, told.background),
        "background_drift": background_drift(seen.background_rgb, native_frames),
        "path_roughness": path_roughness(seen.centre),
        "distance_travelled": distance_travelled(seen.centre),
        "speed": speed if there.any() else float("nan"),
        "speed_error": abs(speed - SPEEDS[told.speed]) if there.any() else float("nan"),
        "repetition": repeated,
        "repetition_straight": repeated if told.motion in STRAIGHT else float("nan"),
    }
    return WorldReading(values=values, identity_by_clip=identity_by_clip(seen, native_frames))


def identity(seen: Track, native_frames: int) -> dict[str, float]:
    """Whether the object of the first native length stays itself in the frames after it.

    `shape_kept` and `colour_kept`: share of the later frames with the most frequent shape (colour) of the first
    `native_frames`; a frame without an object does not keep it. `rgb_drift`: mean distance in RGB of the object's mean
    colour in later frames from its mean in the first ones; frames without an object are left out. All are nan where
    there is no later frame, or no object in the first ones.
    """
    first, later = slice(0, native_frames), slice(native_frames, None)
    nan = float("nan")
    shape, colour = (_majority(names[first]) for names in (seen.shape, seen.colour))
    if not shape or len(seen.shape) <= native_frames:
        return {"shape_kept": nan, "colour_kept": nan, "rgb_drift": nan}
    drift = np.linalg.norm(seen.rgb[later] - np.nanmean(seen.rgb[first], axis=0), axis=1)
    return {
        "shape_kept": _share(seen.shape[later], shape),
        "colour_kept": _share(seen.colour[later], colour),
        "rgb_drift": float(np.nanmean(drift)) if np.isfinite(drift).any() else nan,
    }


def identity_by_clip(seen: Track, native_frames: int) -> list[float]:
    """Share of frames of each clip of native length, the first included, with both shape and colour of the first clip.

    A rest of less than half a clip is left out. Empty where the first clip shows no object.
    """
    shape, colour = (_majority(names[:native_frames]) for names in (seen.shape, seen.colour))
    if not shape:
        return []
    same = [pair == (shape, colour) for pair in zip(seen.shape, seen.colour, strict=True)]
    clips = [same[start : start + native_frames] for start in range(0, len(same), native_frames)]
    return [float(np.mean(clip)) for clip in clips if len(clip) * 2 >= native_frames]


def background_drift(background_rgb: np.ndarray, native_frames: int) -> float:
    """Mean RGB distance in levels of the median colour [F, 3] after the first native length from its mean there."""
    later = background_rgb[native_frames:]
    if len(later) == 0:
        return float("nan")
    return float(np.linalg.norm(later - background_rgb[:native_frames].mean(0), axis=1).mean())


def path_roughness(centre: np.ndarray) -> float:
    """Mean |c[t+1] - 2 c[t] + c[t-1]| of a track [F, 2], px/frame²: 0 for even straight motion, less is smoother.

    True motion is not 0: an orbit has speed² / radius (0.16 and 0.45), a bounce turns a few times. A still object has 0
    too: read it together with the distance. Triples with a frame without an object are left out; nan if there is none.
    """
    bend = np.linalg.norm(centre[2:] - 2 * centre[1:-1] + centre[:-2], axis=1)
    return float(np.nanmean(bend)) if np.isfinite(bend).any() else float("nan")


def distance_travelled(centre: np.ndarray) -> float:
    """Length in pixels of the path [F, 2], from each frame in which the object is seen to the next.

    Where it is lost for some frames the straight line between counts. Trembling counts as distance.
    """
    seen = centre[np.isfinite(centre).all(1)]
    return float(np.linalg.norm(np.diff(seen, axis=0), axis=1).sum())


def repetition(centre: np.ndarray, native_frames: int) -> float:
    """Best autocorrelation of the trajectory [F, 2] at lags of a native length or more, -1..1: 1 is a loop.

    With d[t] the step from frame t to t + 1 less the mean step, and sums over all t at which both steps are known,
    r(L) = sum d[t]·d[t+L] / sqrt(sum |d[t]|² sum |d[t+L]|²), best over native_frames <= L <= F - 1 - native_frames, so
    that at least a native length overlaps. 0 where the steps vary by less than 0.1 px/frame, since an even straight
    path repeats nothing. An orbit and a bounce are true loops: on the whole prompt list compare with other methods, not
    with 0. nan where the video is shorter than two native lengths or the object is seen too seldom.
    """
    step = np.diff(centre, axis=0)
    known = np.isfinite(step).all(1)
    lags = range(native_frames, len(step) - native_frames + 1)
    if not lags or known.sum() < native_frames:
        return float("nan")
    step = np.where(known[:, None], step - step[known].mean(0), 0.0)
    if np.sqrt((step**2).sum() / known.sum()) < QUIET_STEP:
        return 0.0
    best = []
    for lag in lags:
        both = known[:-lag] & known[lag:]
        a, b = step[:-lag][both], step[lag:][both]
        power = np.sqrt((a**2).sum() * (b**2).sum())
        # Half of the least overlap: a few chance steps would correlate perfectly.
        if 2 * both.sum() >= native_frames and power > 0:
            best.append((a * b).sum() / power)
    return float(max(best)) if best else float("nan")


def _share(names: tuple[str, ...], wanted: str) -> float:
    return float(np.mean([name == wanted for name in names]))


def _majority(names: tuple[str, ...]) -> str:
    """The most frequent name that is not "", the first of equals; "" if there is none."""
    found = [name for name in names if name]
    return max(dict.fromkeys(found), key=found.count) if found else ""
