"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output.

Names are imported when they are first used, so that `engine.config` can be read without torch or diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.engine import LongVideoEngine, Result
    from engine.errors import UserError
    from engine.hooks.apply import MethodHandle, Ranks, apply_method
    from engine.hooks.cross_attention import TimelineHandle, apply_timeline
    from engine.media.write_video import write_video
    from engine.presets import read_preset

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
    "MethodHandle": "engine.hooks.apply",
    "Ranks": "engine.hooks.apply",
    "Result": "engine.engine",
    "RunConfig": "engine.config",
    "TimelineHandle": "engine.hooks.cross_attention",
    "UserError": "engine.errors",
    "apply_method": "engine.hooks.apply",
    "apply_timeline": "engine.hooks.cross_attention",
    "read_preset": "engine.presets",
    "write_video": "engine.media.write_video",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
