"""Long videos from pretrained pipelines: configuration, loading, hooks, denoising, decoding and output.

    from engine import LongVideoEngine, read_preset, write_video

    with LongVideoEngine(read_preset("tiny-wan", settings={"video.num_frames": 65})) as engine:
        write_video("circle.mp4", engine.generate("a red circle bounces over a blue background").frames, fps=16)

Names are imported when they are first used, so that `engine.config` can be read without torch or diffusers.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from freespec import __version__ as __version__

# diffusers' image-to-video pipelines import CLIPImageProcessor, and without torchvision transformers warns of it in every process.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "`CLIPImageProcessor` requires torchvision" not in record.getMessage()
)

if TYPE_CHECKING:
    from engine.config import (
        AttentionConfig,
        DecodeConfig,
        MethodConfig,
        ModelConfig,
        OutputConfig,
        ParallelConfig,
        RunConfig,
        SamplerConfig,
        VideoConfig,
    )
    from engine.denoise.denoise import Denoised
    from engine.engine import LongVideoEngine, Result
    from engine.errors import UserError
    from engine.given.frames import GivenFrames, parse_given
    from engine.hooks.apply import MethodHandle, apply_method
    from engine.hooks.cross_attention import TimelineHandle, apply_timeline
    from engine.media.write_video import write_video
    from engine.presets import read_preset
    from engine.ranks.layouts import Ranks

__all__ = [
    "AttentionConfig",
    "DecodeConfig",
    "Denoised",
    "GivenFrames",
    "LongVideoEngine",
    "MethodConfig",
    "MethodHandle",
    "ModelConfig",
    "OutputConfig",
    "ParallelConfig",
    "Ranks",
    "Result",
    "RunConfig",
    "SamplerConfig",
    "TimelineHandle",
    "UserError",
    "VideoConfig",
    "apply_method",
    "apply_timeline",
    "parse_given",
    "read_preset",
    "write_video",
]

_MODULES = {
    "Denoised": "engine.denoise.denoise",
    "GivenFrames": "engine.given.frames",
    "LongVideoEngine": "engine.engine",
    "MethodHandle": "engine.hooks.apply",
    "Ranks": "engine.ranks.layouts",
    "Result": "engine.engine",
    "TimelineHandle": "engine.hooks.cross_attention",
    "UserError": "engine.errors",
    "apply_method": "engine.hooks.apply",
    "apply_timeline": "engine.hooks.cross_attention",
    "parse_given": "engine.given.frames",
    "read_preset": "engine.presets",
    "write_video": "engine.media.write_video",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "engine.config")), name)
