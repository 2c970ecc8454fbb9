"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output."""

from engine.apply import MethodHandle, Ranks, apply_method

__all__ = ["MethodHandle", "Ranks", "apply_method"]
