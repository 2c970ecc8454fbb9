"""Check that a video is long enough for methods to differ, from a checkpoint's JSON files."""

from engine.adapters import VideoSpec
from engine.config import RunConfig
from engine.errors import UserError
from engine.load.checkpoint import open_checkpoint


def is_native(config: RunConfig) -> bool:
    """Whether the video fits the native window, so that every method runs the base model."""
    spec, video = open_checkpoint(config.model).spec, config.video
    spec.check_video(video.num_frames, video.height, video.width)
    return _token_frames(spec, config) <= config.method.window_frames


def check_longer(config: RunConfig, why: str) -> None:
    """Raise UserError for a video of native length or less; `why` explains why it is too short."""
    if is_native(config):
        spec, native = open_checkpoint(config.model).spec, config.method.window_frames
        raise UserError(
            f"{config.video.num_frames} frames are {_token_frames(spec, config)} latent frames, and the native window is "
            f"{native}; {why}, such as --video.num_frames {spec.native_frames(4 * native)} for four native lengths"
        )


def _token_frames(spec: VideoSpec, config: RunConfig) -> int:
    video = config.video
    return spec.latent_shape(video.num_frames, video.height, video.width)[2] // spec.patch[0]
