"""Check a video file by decoding all of it."""

from pathlib import Path

from engine.errors import UserError
from engine.media.read_video import read_video


def check_video(path: Path, *, num_frames: int, height: int, width: int) -> None:
    """Raise OSError unless the mp4 decodes to `num_frames` frames of this size."""
    count = 0
    try:
        for frame in read_video(path):
            if frame.shape != (height, width, 3):
                raise OSError(f"{path}: frame {count} is {frame.shape[0]} x {frame.shape[1]}, not {height} x {width}")
            count += 1
    except UserError as error:
        raise OSError(str(error)) from error
    if count != num_frames:
        raise OSError(f"{path} decodes to {count} frames, not {num_frames}")
