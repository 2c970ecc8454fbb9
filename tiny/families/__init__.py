"""The model families of which the embedded checkpoints are miniatures, by name."""

from tiny.families.base import Denoiser, Family
from tiny.families.ltx import Ltx
from tiny.families.wan import Wan

__all__ = ["FAMILIES", "Denoiser", "Family"]

FAMILIES: dict[str, Family] = {"wan": Wan(), "ltx": Ltx()}
