"""Latents to the files a person looks at: the video and its contact sheet, and the record that is written last."""

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from engine.adapters.base import VideoSpec
from engine.config import OutputConfig
from engine.decode.decoder import VideoDecoder
from engine.engine import LongVideoEngine
from engine.errors import UserError, is_out_of_memory
from engine.files.whole import describe_error
from engine.media.contact_sheet import FrameSampler, contact_sheet, write_picture
from engine.media.write_video import open_video
from engine.record import describe_video, peak_memory, video_facts, write_record
from launch.exit_codes import LostRankError
from launch.outputs import OutputFiles
from launch.stopping import Stopped
from parallel.collectives import CollectiveError


def render(
    engine: LongVideoEngine | VideoDecoder,
    latents: Tensor,
    record: dict[str, Any],
    files: OutputFiles,
    *,
    output: OutputConfig,
    fps: int,
    replace: bool,
) -> dict[str, Any]:
    """Decode latents that lie in `files.latents`, made with the seed of `record`; write video, contact sheet and whole record.

    Rank 0 calls this, while the other ranks run `engine.decode.pieces` of the same latents to its end.
    If it is stopped or the disk is full, no file is left under its final name before it is whole, and the message says how
    to go on from the latents. Without `replace` a file that is there already is left, and is an error unless it has the
    bytes that these latents give, which an earlier run has written then.
    """
    try:
        return _render(engine, latents, record, files, output=output, fps=fps, replace=replace)
    except KeyboardInterrupt as error:
        raise Stopped(f"while decoding; {describe_kept(files)}") from error
    except CollectiveError as error:
        raise LostRankError(f"{error}; {describe_kept(files)}") from error
    except OSError as error:
        is_whole = files.video.exists() and str(error.filename) != str(files.video)
        whole = f"{files.video} is whole; " if is_whole else ""
        raise UserError(f"{describe_error(error, files.video)}; {whole}{describe_kept(files)}") from error
    except BaseException as error:
        if is_out_of_memory(error):
            raise UserError(
                f"out of memory while decoding on {engine.device}; {describe_kept(files)} --decode.mode tiled"
            ) from error
        error.add_note(describe_kept(files))
        raise


def video_size(latents: Tensor, spec: VideoSpec, record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of the video that is written of latents [B, z, F, h, w]."""
    frames, rows, columns = latents.shape[2:]
    num_frames = spec.num_frames(frames) - _left_out(record)
    return num_frames, rows * spec.spatial_factor, columns * spec.spatial_factor


def describe_kept(files: OutputFiles) -> str:
    """Say where the latents are, and how the video is made of them."""
    command = ["python", "launch/decode.py", str(files.latents), "--output", files.name]
    if any(path.exists() for path in (files.video, files.sheet, files.record)):
        command.append("--overwrite")
    return (
        f"the latents are kept in {files.latents}; the same command goes on from them, or make the video with: "
        f"{shlex.join(command)}"
    )


def _render(
    engine: LongVideoEngine | VideoDecoder,
    latents: Tensor,
    record: dict[str, Any],
    files: OutputFiles,
    *,
    output: OutputConfig,
    fps: int,
    replace: bool,
) -> dict[str, Any]:
    started = time.perf_counter()
    left_out = _left_out(record)
    num_frames, height, width = video_size(latents, engine.spec, record)
    sampler = FrameSampler(total=num_frames, count=output.sheet_frames)
    facts = video_facts(record) if output.metadata else None
    with open_video(
        files.video,
        kind=files.kind,
        fps=fps,
        height=height,
        width=width,
        crf=output.crf,
        facts=facts,
        replace=replace,
    ) as video:
        seen = 0
        for piece in engine.decode(latents, seed=record["seed"]):
            new = piece[max(left_out - seen, 0) :]
            seen += len(piece)
            video.write(new)
            sampler.add(new)
        if replace:  # an old record must not stand beside the new video
            files.record.unlink(missing_ok=True)
    sheet = contact_sheet(
        sampler.frames, [i / fps for i in sampler.indices], _events_of(record, [left_out + i for i in sampler.indices])
    )
    write_picture(files.sheet, sheet, replace=replace)
    record = record | {
        "seconds": record["seconds"] | {"decode": time.perf_counter() - started},
        "peak_memory": peak_memory(engine.device),
        "decode": engine.decode_plan,
        "video": describe_video(files.video, num_frames=num_frames, fps=fps),
    }
    write_record(files.record, record, replace=replace)
    return record


def _left_out(record: Mapping[str, Any]) -> int:
    """Frames at the beginning that are not written: those of the video that this one goes on from, where the new ones are asked for."""
    given = record.get("given")
    return given["extend"]["stop"] if given is not None and given["shows"] == "new" else 0


def _events_of(record: dict[str, Any], frames: Sequence[int]) -> list[str] | None:
    """Number and text of the event that each frame belongs to; None for a video without a timeline."""
    if record.get("timeline") is None:
        return None
    events = list(enumerate(record["timeline"], start=1))
    return [
        next((f"{index} {event['text']}" for index, event in events if event["start"] <= frame < event["stop"]), "")
        for frame in frames
    ]
