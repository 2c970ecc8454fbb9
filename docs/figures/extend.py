"""Draw docs/figures/extend.png, a clip of 33 frames continued in both ways of benchmarks/extensions.py: `python -m docs.figures.extend`."""

from pathlib import Path

from benchmarks.extensions import FPS, LENGTH, NATIVE, make, read_prompts
from benchmarks.videos import open_engine
from engine.media.contact_sheet import Row, comparison, spaced, write_picture

NOTES = {"extension": "the latents kept", "chain": "9 frames encoded again"}
STEPS, GUIDANCE, COLUMNS = 6, 2.5, 7


def draw_extend(path: Path, prompt: str) -> None:
    """Make both videos and write the same moments of each as rows."""
    moments = spaced(LENGTH, COLUMNS)
    with open_engine(STEPS, GUIDANCE) as engine:
        rows = [Row(name=way, note=note, frames=make(engine, prompt, way, 0)[moments]) for way, note in NOTES.items()]
    title = f"{NATIVE} frames continued to {LENGTH}; the clip ends at {(NATIVE - 1) / FPS:g} s"
    write_picture(
        path,
        comparison(rows, [frame / FPS for frame in moments], title=title, subtitle=prompt, width=1200),
    )


if __name__ == "__main__":
    draw_extend(Path(__file__).with_name("extend.png"), read_prompts()[0])
