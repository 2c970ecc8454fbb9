"""What the commands that compare refuse before anything is loaded, and whether a video is long enough to compare methods on."""

from engine.adapters import VideoSpec
from engine.config import ModelConfig, OutputConfig, RunConfig
from engine.errors import UserError
from engine.load import fetch, find_checkpoint, read_spec

_NUM_SEEDS = 2**63  # what a seed must be less than (SamplerConfig)
# Settings of one video's files; here every video has a name of its own, and one that is there is not made again.
_OF_ONE_VIDEO = ("path", "overwrite", "save_latents", "trace")


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


def check_output(output: OutputConfig, name: str) -> None:
    """Raise UserError for settings of `output` that the command would not read."""
    default = OutputConfig()
    given = [f"output.{key}" for key in _OF_ONE_VIDEO if getattr(output, key) != getattr(default, key)]
    if given:
        verb = "is" if len(given) == 1 else "are"
        raise UserError(f"{', '.join(given)} {verb} not read by {name}, which names its files itself; leave them out")


def check_seeds(first: int, count: int, flag: str) -> None:
    """Raise UserError if the last of `count` seeds from `first` on is one that there is not."""
    if first + count > _NUM_SEEDS:
        raise UserError(
            f"{flag} {count} from sampler.seed {first} on ends at {first + count - 1}, and seeds are less than 2**63; "
            f"begin at {_NUM_SEEDS - count} or less"
        )


def _token_frames(spec: VideoSpec, config: RunConfig) -> int:
    video = config.video
    return spec.latent_shape(video.num_frames, video.height, video.width)[2] // spec.patch[0]
