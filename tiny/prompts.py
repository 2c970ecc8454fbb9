"""Write the lists of held-out captions in configs/prompts: `python -m tiny.prompts`.

Settings are searched on one list and judged on the other, so that the two share no combination of shape, colour and motion,
and neither contains a combination of the training.
"""

import argparse
from pathlib import Path

import numpy as np

from tiny.world import COLOURS, MOTIONS, SHAPES, Scene, caption, is_held_out, sample_scene

REPORT = "world-heldout-40.txt"
CALIBRATION = "world-calibration-20.txt"
SEED = 17

Combination = tuple[str, str, str]


def split_combinations(rng: np.random.Generator) -> tuple[list[Combination], list[Combination]]:
    """The held-out combinations for the report and for calibration: one of each motion goes to calibration."""
    report, calibration = [], []
    for motion in MOTIONS:
        held_out = [
            (shape, colour, motion) for shape in SHAPES for colour in COLOURS if is_held_out(shape, colour, motion)
        ]
        chosen = int(rng.integers(len(held_out)))
        calibration.append(held_out.pop(chosen))
        report += held_out
    return report, calibration


def captions(combinations: list[Combination], count: int, rng: np.random.Generator) -> list[str]:
    """`count` different captions that take the combinations in turn; everything else is random."""
    found: list[str] = []
    while len(found) < count:
        wanted = combinations[len(found) % len(combinations)]
        text = caption(_scene_of(wanted, rng), rng)
        if text not in found:
            found.append(text)
    return found


def write_lists(folder: Path) -> None:
    """Write both lists, one caption a line."""
    rng = np.random.default_rng(SEED)
    report, calibration = split_combinations(rng)
    folder.mkdir(parents=True, exist_ok=True)
    for name, combinations, count in ((REPORT, report, 40), (CALIBRATION, calibration, 20)):
        # The first few captions of a list have every kind of motion, for short runs.
        order = [combinations[i] for i in _by_motion_in_turn(combinations)]
        (folder / name).write_text("\n".join(captions(order, count, rng)) + "\n", encoding="utf-8")


def _by_motion_in_turn(combinations: list[Combination]) -> list[int]:
    """Indices such that the motions alternate: the first combination of each motion, then the second of each, ..."""
    seen: dict[str, int] = {}
    turns = []
    for index, (_, _, motion) in enumerate(combinations):
        seen[motion] = seen.get(motion, 0) + 1
        turns.append((seen[motion], index))
    return [index for _, index in sorted(turns)]


def _scene_of(wanted: Combination, rng: np.random.Generator) -> Scene:
    while True:
        scene = sample_scene(rng, held_out=True)
        if (scene.shape, scene.colour, scene.motion) == wanted:
            return scene


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "configs" / "prompts")
    write_lists(parser.parse_args().folder)


if __name__ == "__main__":
    main()
