"""The LoRA of four steps follows its teacher, and its card says what was measured."""

import json

import torch
from torch import Tensor

from engine import LongVideoEngine, read_preset
from tiny.distill import FILE, ROOT, SHOWN, card

LORAS = ROOT / "loras"
NATIVE = {"video.num_frames": 33, "method.name": "direct", "model.device": "cpu", "output.progress": "off"}


def test_the_card_is_written_from_the_figures() -> None:
    figures = json.loads((LORAS / "figures.json").read_text())
    assert (LORAS / "README.md").read_text() == card(figures)
    assert all(set(SHOWN) <= run["matches"].keys() for run in figures["runs"].values())
    assert (LORAS / FILE).stat().st_size < 2**20


def latents_of(preset: str, **settings: object) -> list[Tensor]:
    with LongVideoEngine(read_preset(preset, settings=NATIVE | settings)) as engine:
        return [
            engine.denoise(f"a {colour} star moves left over a gray background").latents for colour in ("red", "blue")
        ]


def test_four_steps_come_nearer_to_twenty_with_the_lora_than_without() -> None:
    teacher = latents_of("tiny-wan")
    student, without = latents_of("tiny-wan-4steps"), latents_of("tiny-wan-4steps", **{"model.loras": ()})

    def distances(found: list[Tensor]) -> list[float]:
        return [float(torch.dist(a, b) / b.norm()) for a, b in zip(found, teacher, strict=True)]

    for near, far in zip(distances(student), distances(without), strict=True):
        assert near < 0.9 * far
