"""decode.py: saved latents to a video."""

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import RunConfig
from engine.decode.decoder import open_decoder
from engine.errors import UserError, check_finite
from engine.files.checks import check_space, least_video_bytes
from engine.files.latents import load_latents
from engine.load.checkpoint import open_checkpoint
from engine.media.read_video import measure
from engine.paths import expand
from engine.produce import decode_to_files, video_size
from launch.arguments.decode import Arguments
from launch.process.stopping import ignoring_signals
from launch.video.interruptions import explain_decoding
from launch.video.latents_record import ADVICE, decoded_by, decoding_part, read_record, restore_config
from launch.video.outputs import OutputFiles, claim_outputs, frame_folders, refuse_existing
from launch.video.stages import check_decoded, describe_finished
from launch.video.stages import read_record as read_finished


def run(given: Arguments) -> None:
    """Read the latents and the record in them, check the outputs, load the VAE and decode."""
    source = given.latents
    latents, metadata = load_latents(source)
    check_finite(latents, where=f"in {source}", remedy="make them again with launch/generate.py")
    record = read_record(metadata, source)
    config = given.over(restore_config(decoding_part(record["config"]), source))

    files = OutputFiles(video=expand(config.output.path), latents=source, keep_latents=True)
    with contextlib.ExitStack() as last, claim_outputs(files.decoded, flag="--output", folders=frame_folders([files])):
        spec = open_checkpoint(config.model).spec
        check_shape(latents, spec.channels, source)
        size = video_size(latents, spec, record)
        if size[0] < 1:
            begun, frames = record["given"]["extend"]["stop"], spec.num_frames(latents.shape[2])
            raise UserError(f"{source} claims to continue {begun} frames, but has {frames}; {ADVICE}")
        if not config.output.overwrite and (finished := describe_decoded(files, record, config, size)) is not None:
            print(finished)
            return
        check_space({files.video: least_video_bytes(*size, kind=files.kind)}, what="the video")
        record = record | {"config": record["config"] | decoded_by(config), "decoded_from": source.name}
        with open_decoder(config) as decoder:
            with explain_decoding(files, decoder.device):
                record = decode_to_files(decoder, latents, record, files.decoding, replace=config.output.overwrite)
            last.enter_context(ignoring_signals())
    print(f"{files.video}: {record['video']['num_frames']} frames; decoded in {record['seconds']['decode']:.1f} s")


def describe_decoded(
    files: OutputFiles, record: dict[str, Any], config: RunConfig, size: tuple[int, int, int]
) -> str | None:
    """Describe a video that is already decoded; None if it is not, UserError if other files exist.

    A video of this size without a record may be left from an interrupted run: it is decoded again, and kept if it differs.
    """
    flag = "--overwrite"
    before = read_finished(files.record)
    settings = _settings_of(record)
    if before is None or settings is None:
        is_left = not os.path.lexists(files.record) and measure(files.video) == size
        refuse_existing([] if is_left else files.decoded, flag)
        return None
    check_decoded(files, before, config, settings, flag)
    return describe_finished(files, before, flag)


def _settings_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of the latents of a record; None if it has none."""
    identity = record.get("identity")
    settings = identity.get("settings") if isinstance(identity, dict) else None
    return settings if isinstance(settings, dict) else None


def check_shape(latents: Tensor, channels: int, source: Path) -> None:
    """Raise UserError unless the latents are of one video and have `channels` channels."""
    if latents.dim() != 5 or latents.shape[:2] != (1, channels) or latents.numel() == 0:
        raise UserError(
            f"{source} holds latents of the shape {list(latents.shape)}, and this model's are [1, {channels}, frames, rows, "
            "columns]; give --model.path of the model that made them"
        )
