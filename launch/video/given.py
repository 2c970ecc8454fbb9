"""Check given frames before anything is loaded."""

from engine.config import RunConfig
from engine.given.frames import GivenFrames
from engine.given.known import check_given
from engine.load.checkpoint import open_checkpoint


def look_at_given(config: RunConfig, given: GivenFrames | None) -> list[str]:
    """Check the given frames before anything is loaded; returns notes for the user, one sentence each."""
    if given is None:
        return []
    video, spec = config.video, open_checkpoint(config.model).spec
    size = {"num_frames": video.num_frames, "height": video.height, "width": video.width}
    return check_given(given, spec, **size, fps=video.fps)
