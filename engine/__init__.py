"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output.

Names are imported when they are first used, so that `engine.config` can be read without torch or diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.apply import MethodHandle, Ranks, apply_method
    from engine.apply_timeline import TimelineHandle, apply_timeline
    from engine.engine import LongVideoEngine

__all__ = ["LongVideoEngine", "MethodHandle", "Ranks", "TimelineHandle", "apply_method", "apply_timeline"]

_MODULES = {
    "LongVideoEngine": "engine.engine",
    "MethodHandle": "engine.apply",
    "Ranks": "engine.apply",
    "TimelineHandle": "engine.apply_timeline",
    "apply_method": "engine.apply",
    "apply_timeline": "engine.apply_timeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
