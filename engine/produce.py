"""Make the files of one video: noise to latents and their file, and latents to a video, its contact sheet and its record."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.adapters.base import VideoSpec
from engine.decode.decoder import VideoDecoder
from engine.engine import LongVideoEngine
from engine.files.latents import save_latents
from engine.files.video import VideoFiles
from engine.media.contact_sheet import FrameSampler, contact_sheet, write_picture
from engine.media.write_video import open_video
from engine.record import build_record, describe_video, peak_memory, video_facts, write_record

Record = dict[str, Any]


class LatentsKept(KeyboardInterrupt):
    """An interruption before decoding, raised once the latents are written."""


@dataclass(frozen=True, kw_only=True)
class LatentsFile:
    """Where the latents of a video are kept, and how.

    Attributes:
        path: the safetensors file.
        metadata: its metadata; None stores the record, from which `launch/decode.py` makes the video.
        outdated: the record of an earlier video, which is deleted first; None deletes nothing.
        replace: whether a file that exists is replaced.
    """

    path: Path
    metadata: dict[str, str] | None = None
    outdated: Path | None = None
    replace: bool = True

    def write(self, latents: Tensor, record: Record) -> None:
        """Write the latents atomically."""
        if self.outdated is not None:
            self.outdated.unlink(missing_ok=True)
        metadata = {"record": json.dumps(record, allow_nan=False)} if self.metadata is None else self.metadata
        save_latents(self.path, latents, metadata, replace=self.replace)


def denoise_to_file(
    engine: LongVideoEngine, prompt: str, *, seed: int | None = None, file: LatentsFile | None, **options: Any
) -> tuple[Tensor, Record]:
    """Denoise one video; every rank calls this. Returns its latents and, on rank 0, which writes them, its record so far.

    `options` are those of `LongVideoEngine.denoise`. The latents, which take long, are written before anything is decoded;
    `file` None writes none.
    """
    denoised = engine.denoise(prompt, seed=seed, **options)
    if not engine.is_first:
        return denoised.latents, {}
    seconds = {"load": engine.load_seconds, **denoised.seconds}

    def keep() -> Record:
        record = build_record(engine.facts, denoised, seconds=seconds)
        if file is not None:
            file.write(denoised.latents, record)
        return record

    try:
        return denoised.latents, keep()
    except KeyboardInterrupt as error:
        if file is None:
            raise
        keep()  # further interruptions wait while one is handled, so this time the latents are written
        raise LatentsKept from error


def decode_to_files(
    decoder: VideoDecoder,
    latents: Tensor,
    record: Record,
    files: VideoFiles,
    *,
    replace: bool = True,
    on_frames: Callable[[np.ndarray], None] | None = None,
) -> Record:
    """Decode latents and write the files of their video, on rank 0; returns the record with what decoding adds to it.

    Frame rate, quality, metadata and contact sheet follow the record's configuration, and the seed is the record's. Every file
    is complete before it gets its name. Without `replace` an existing file is kept, and is an error unless it holds the
    same bytes, as from an earlier run. `on_frames` gets the written frames, uint8 [t, H, W, 3].
    """
    started = time.perf_counter()
    output, fps = record["config"]["output"], record["config"]["video"]["fps"]
    skipped = _num_skipped(record)
    num_frames, height, width = video_size(latents, decoder.spec, record)
    sampler = FrameSampler(total=num_frames, count=output["sheet_frames"])
    with open_video(
        files.video,
        kind=files.kind,
        fps=fps,
        height=height,
        width=width,
        crf=output["crf"],
        facts=video_facts(record) if output["metadata"] else None,
        replace=replace,
    ) as video:
        seen = 0
        for piece in decoder.decode(latents, seed=record["seed"]):
            frames = piece[max(skipped - seen, 0) :]
            seen += len(piece)
            video.write(frames)
            if files.sheet is not None:
                sampler.add(frames)
            if on_frames is not None:
                on_frames(frames)
        if replace and files.record is not None:  # an old record must not remain beside the new video
            files.record.unlink(missing_ok=True)
    if files.sheet is not None:
        captions = _event_captions(record, [skipped + i for i in sampler.indices])
        sheet = contact_sheet(sampler.frames, [i / fps for i in sampler.indices], captions)
        write_picture(files.sheet, sheet, replace=replace)
    record = record | {
        "seconds": record["seconds"] | {"decode": time.perf_counter() - started},
        "peak_memory": peak_memory(decoder.device),
        "decode": decoder.decode_plan,
    }
    if files.record is not None:
        record["video"] = describe_video(files.video, num_frames=num_frames, fps=fps)
        write_record(files.record, record, replace=replace)
    return record


def share_decoding(decoder: VideoDecoder, latents: Tensor, *, seed: int) -> None:
    """Decode this rank's tiles, if there are any, while rank 0 runs `decode_to_files`."""
    for _ in decoder.decode(latents, seed=seed):
        pass


def video_size(latents: Tensor, spec: VideoSpec, record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, rows and columns of the video that is written for latents [B, z, F, h, w]."""
    frames, rows, columns = latents.shape[2:]
    num_frames = spec.num_frames(frames) - _num_skipped(record)
    return num_frames, rows * spec.spatial_factor, columns * spec.spatial_factor


def _num_skipped(record: Mapping[str, Any]) -> int:
    """Leading frames that are not written: those of the continued video, if only new ones are shown."""
    given = record.get("given")
    return given["extend"]["stop"] if given is not None and given["shows"] == "new" else 0


def _event_captions(record: Record, frames: Sequence[int]) -> list[str] | None:
    """Number and text of the event at each frame; None for a video without a timeline."""
    if record.get("timeline") is None:
        return None
    events = list(enumerate(record["timeline"], start=1))
    return [
        next((f"{index} {event['text']}" for index, event in events if event["start"] <= frame < event["stop"]), "")
        for frame in frames
    ]
