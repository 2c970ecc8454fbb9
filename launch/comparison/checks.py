"""Whether a video is long enough to compare methods on, from a checkpoint's JSON files."""

from engine.adapters import VideoSpec
from engine.config import ModelConfig, RunConfig
from engine.errors import UserError
from engine.load.pipeline import fetch, find_checkpoint, read_spec


def read_video_spec(model: ModelConfig) -> VideoSpec:
    """The numbers of a checkpoint, from its JSON files."""
    return read_spec(fetch(find_checkpoint(model.path), model.revision, parts=(), offline=model.offline))


def is_native(config: RunConfig) -> bool:
    """Whether the video is no longer than the native window: the engine then runs the base model, whatever the method."""
    spec, video = read_video_spec(config.model), config.video
    spec.check_video(video.num_frames, video.height, video.width)
    return _token_frames(spec, config) <= config.method.window_frames


def check_longer(config: RunConfig, why: str) -> None:
    """Raise UserError for a video of native length or less; `why` says what it would be of no use for."""
    if is_native(config):
        spec, native = read_video_spec(config.model), config.method.window_frames
        raise UserError(
            f"{config.video.num_frames} frames are {_token_frames(spec, config)} latent frames, and the native window is "
            f"{native}; {why}, such as --video.num_frames {spec.native_frames(4 * native)} for four native lengths"
        )


def _token_frames(spec: VideoSpec, config: RunConfig) -> int:
    video = config.video
    return spec.latent_shape(video.num_frames, video.height, video.width)[2] // spec.patch[0]
