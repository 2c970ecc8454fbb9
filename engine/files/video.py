"""The files that are made of the latents of one video."""

from dataclasses import dataclass
from pathlib import Path

from engine.config import VideoKind


@dataclass(frozen=True, kw_only=True)
class VideoFiles:
    """The video and, unless they are None, its contact sheet and its record, which is written last."""

    video: Path
    kind: VideoKind = "mp4"
    sheet: Path | None = None
    record: Path | None = None
