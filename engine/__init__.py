"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output."""

from engine.apply import MethodHandle, Ranks, apply_method
from engine.engine import LongVideoEngine

__all__ = ["LongVideoEngine", "MethodHandle", "Ranks", "apply_method"]
