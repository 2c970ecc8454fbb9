"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output.

Names are imported when they are first used, so that `engine.config` can be read without torch or diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.apply import MethodHandle, Ranks, apply_method
    from engine.config import RunConfig
    from engine.engine import LongVideoEngine, Result
    from engine.errors import UserError
    from engine.presets import read_preset
    from engine.timeline_hooks import TimelineHandle, apply_timeline
    from engine.video import write_video

__all__ = [
    "LongVideoEngine",
    "MethodHandle",
    "Ranks",
    "Result",
    "RunConfig",
    "TimelineHandle",
    "UserError",
    "apply_method",
    "apply_timeline",
    "read_preset",
    "write_video",
]

_MODULES = {
    "LongVideoEngine": "engine.engine",
    "MethodHandle": "engine.apply",
    "Ranks": "engine.apply",
    "Result": "engine.engine",
    "RunConfig": "engine.config",
    "TimelineHandle": "engine.timeline_hooks",
    "UserError": "engine.errors",
    "apply_method": "engine.apply",
    "apply_timeline": "engine.timeline_hooks",
    "read_preset": "engine.presets",
    "write_video": "engine.video",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
