"""A procedural world: one coloured shape moves over a softly textured background, with a caption that says so.

Everything is a closed-form function of the frame number, so a clip of any length exists and a longer render of a scene begins with the
shorter one. Straight motion and camera pans live on a torus (what leaves at one edge enters at the other), so they go on for ever.
Units: pixels and frames; x grows to the right, y grows downwards; a pixel's centre has a half-integer coordinate.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 64
"""Height and width of a frame in pixels, and the period of the torus."""

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (228, 40, 44),
    "green": (52, 205, 76),
    "blue": (48, 96, 245),
    "yellow": (246, 216, 48),
    "purple": (176, 56, 214),
    "white": (242, 242, 242),
}
BACKGROUNDS = {"gray": (106, 106, 112), "blue": (44, 62, 104), "green": (42, 86, 60), "brown": (100, 72, 50)}
TEXTURES = {
    "gray": ((2, 2, 11.0), (2, -2, 6.0)),
    "blue": ((2, 0, 12.0), (1, 3, 6.0)),
    "green": ((2, -1, 12.0), (2, 3, 5.0)),
    "brown": ((2, 1, 11.0), (4, 0, 6.0)),
}
"""Sine waves of a background: (cycles over the width, cycles over the height, amplitude in levels), the main one first."""

RADII = {"small": 10.0, "large": 13.0}
SPEEDS = {"normal": 1.5, "fast": 2.5}
PAN_SPEED = 1.0
ORBIT_RADIUS = 14.0
STRAIGHT = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
ORBITS = {"clockwise": 1.0, "counterclockwise": -1.0}
MOTIONS = (*STRAIGHT, *ORBITS, "bounce")
PANS = {"left": -1.0, "right": 1.0, "none": 0.0}

PHRASES = {
    **{name: (f"moves {name}", f"moves to the {name}") for name in ("left", "right")},
    **{name: (f"moves {name}", f"moves {name}wards") for name in ("up", "down")},
    **{name: (f"circles {name}", f"turns {name}") for name in ORBITS},
    "bounce": ("bounces", "bounces around"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What is seen: the first seven fields are what a caption tells, the rest is chance.

    `start` is the position in frame 0 (straight motion and bouncing) or the centre of the orbit; `angle` in radians is the first
    heading of a bounce or the first place on an orbit; `texture_start` is the offset of the background. `pan` is where the camera
    goes: the background slides the other way, while the object's motion is told and measured relative to the picture.

    Chance moves a scene by some pixels only, and a motion begins where there is room for it: what goes right begins on the left.
    From anywhere on the torus all directions would look the same under much noise, and the words for them would hardly be learned
    (seen: 12 % of directions right after 7,000 steps).
    """

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    background: str
    pan: str
    start: tuple[float, float]
    angle: float
    texture_start: tuple[float, float]


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """True for every eighth combination: never trained on, always evaluated on."""
    code = SHAPES.index(shape) + 3 * list(COLOURS).index(colour) + 5 * MOTIONS.index(motion)
    return code % 8 == 1


def sample_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
    """A random scene from the trained combinations, or from the held-out ones."""
    while True:
        shape, colour, motion = (str(rng.choice(names)) for names in (SHAPES, tuple(COLOURS), MOTIONS))
        if is_held_out(shape, colour, motion) == held_out:
            break
    size = str(rng.choice(tuple(RADII)))
    speed = str(rng.choice(tuple(SPEEDS)))
    angle = 0.0
    if motion == "bounce":
        angle = float(rng.uniform(np.pi / 7, np.pi / 6))
        start = _start_before_a_bounce(rng, RADII[size], SPEEDS[speed], angle)
    elif motion in ORBITS:
        angle = float(rng.uniform(-0.5, 0.5) - np.pi / 2)
        start = tuple(rng.uniform(-3, 3, 2) + SIZE / 2)
    else:
        along = np.array(STRAIGHT[motion])
        start = tuple(SIZE / 2 - 18 * along + rng.uniform(-5, 5, 2))
    return Scene(
        shape=shape,
        colour=colour,
        size=size,
        motion=motion,
        speed=speed,
        background=str(rng.choice(tuple(BACKGROUNDS))),
        pan=str(rng.choice(tuple(PANS), p=(0.25, 0.25, 0.5))),
        start=start,
        angle=angle,
        texture_start=tuple(rng.uniform(-5, 5, 2)),
    )


def _start_before_a_bounce(rng: np.random.Generator, radius: float, speed: float, angle: float) -> tuple[float, float]:
    """A start on the upper left from which the right wall is reached by frame 17, so that every bouncing clip bounces.

    Always the right wall first, and always around the middle of a clip of native length: the mean of clips that turn at one wall or the
    other, or at any time between frames 10 and 18, is an arc, and arcs were what the model learned (seen: 12 and 0 % of bounces right).
    """
    low, high = radius + 1, SIZE - radius - 1
    return high - np.cos(angle) * speed * rng.uniform(15, 17), low + rng.uniform(0, 6)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the phrasings of a scene. Large and normal speed are what an unsaid word means."""
    article = rng.choice(("a", "the"), p=(0.8, 0.2))
    size = "small " if scene.size == "small" else rng.choice(("", "large "), p=(0.7, 0.3))
    motion = rng.choice(PHRASES[scene.motion])
    speed = rng.choice((" fast", " quickly")) if scene.speed == "fast" else ""
    over = rng.choice(("over", "on"), p=(0.7, 0.3))
    pan = "" if scene.pan == "none" else f", the camera pans {scene.pan}"
    return f"{article} {size}{scene.colour} {scene.shape} {motion}{speed} {over} a {scene.background} background{pan}"


def _vocabulary() -> tuple[str, ...]:
    """Every word a caption can hold, plus the articles that can open a sentence."""
    phrases = " ".join(phrase for phrases in PHRASES.values() for phrase in phrases)
    rest = "A The a the small large fast quickly over on background camera pans"
    words = {*phrases.split(), *rest.split(), *SHAPES, *COLOURS, *BACKGROUNDS, *STRAIGHT}
    return tuple(sorted(words))


VOCABULARY = _vocabulary()


def positions(scene: Scene, num_frames: int) -> np.ndarray:
    """Centres of the object, [F, 2] as (x, y) in pixels, not wrapped on the torus."""
    time = np.arange(num_frames)[:, None]
    start, speed = np.array(scene.start), SPEEDS[scene.speed]
    if scene.motion in STRAIGHT:
        return start + time * speed * np.array(STRAIGHT[scene.motion])
    if scene.motion in ORBITS:
        angle = scene.angle + ORBITS[scene.motion] * time * speed / ORBIT_RADIUS
        return start + ORBIT_RADIUS * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    low, span = RADII[scene.size] + 1, SIZE - 2 * RADII[scene.size] - 2
    free = start - low + time * speed * np.array([np.cos(scene.angle), np.sin(scene.angle)])
    return low + span - np.abs(free % (2 * span) - span)


UNIT_AREAS = {
    "circle": np.pi * 0.95**2,
    "square": 1.68**2,
    "triangle": 3 * np.sqrt(3) * 0.66**2,
    "star": 5 * 1.25 * 0.58 * np.sin(np.pi / 5),
}
"""Area of each shape at radius 1, in square pixels."""


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from points (x, y), relative to the centroid, to the outline of a shape of radius 1; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.84
    if shape == "triangle":
        return np.maximum(np.sqrt(0.75) * np.abs(x) - 0.5 * y, y) - 0.66
    # A five-pointed star: in the wedge of one half-point the outline is a straight line from the tip to the notch.
    wedge = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    tip, notch = np.array([1.25, 0.0]), 0.58 * np.array([np.cos(wedge), np.sin(wedge)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    distance = np.hypot(x, y)
    return (distance * np.cos(angle) - tip[0]) * normal[0] + distance * np.sin(angle) * normal[1]


def coverage(shape: str, radius: float | np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Share of each pixel the object covers, [F, SIZE, SIZE] in 0..1.

    Centres are [F, 2] on the torus; the radius in pixels is one number, or [F, 1, 1].
    """
    pixel = np.arange(SIZE) + 0.5
    half = SIZE / 2
    x = (pixel[None, None, :] - centres[:, 0, None, None] + half) % SIZE - half
    y = (pixel[None, :, None] - centres[:, 1, None, None] + half) % SIZE - half
    return np.clip(0.5 - radius * signed_distance(shape, x / radius, y / radius), 0, 1)


def backdrop(scene: Scene, num_frames: int) -> np.ndarray:
    """The background alone, float [F, SIZE, SIZE, 3] in levels 0..255."""
    pixel = np.arange(SIZE) + 0.5
    shift = np.arange(num_frames) * PAN_SPEED * PANS[scene.pan]
    x = pixel[None, None, :] + scene.texture_start[0] + shift[:, None, None]
    y = pixel[None, :, None] + scene.texture_start[1]
    light = sum(level * np.sin(2 * np.pi * (kx * x + ky * y) / SIZE) for kx, ky, level in TEXTURES[scene.background])
    return np.array(BACKGROUNDS[scene.background]) + light[..., None]


def render(scene: Scene, num_frames: int) -> np.ndarray:
    """The clip, uint8 [F, SIZE, SIZE, 3]."""
    alpha = coverage(scene.shape, RADII[scene.size], positions(scene, num_frames))[..., None]
    clip = (1 - alpha) * backdrop(scene, num_frames) + alpha * np.array(COLOURS[scene.colour])
    return np.rint(clip).astype(np.uint8)
