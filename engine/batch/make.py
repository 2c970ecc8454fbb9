"""Make one item of a batch: from noise to a checked video, and its sidecar, which is written last."""

import dataclasses
import errno
import hashlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.batch.files import item_files
from engine.batch.items import FILE
from engine.batch.store import publish
from engine.config import RunConfig
from engine.decode.preview import Previewer, PreviewFactors
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.storage import FolderGoneError
from engine.files.video import VideoFiles
from engine.files.whole import write_json
from engine.given.frames import GivenFrames
from engine.media.read_video import read_video
from engine.produce import LatentsFile, decode_to_files, denoise_to_file, share_decoding


@dataclass(frozen=True, kw_only=True)
class ItemMaker:
    """Makes items with one loaded engine; every rank has one.

    Attributes:
        engine: the engine, whose configuration is that of a variant.
        configs: the configuration of each variant by its label.
        root: the batch's folder.
        snapshot_every: steps between snapshots of an item; 0 writes only the one after the last step, before decoding.
        keep_latents: whether latents are kept.
        sheets: whether a contact sheet is written beside each video.
        given: the given frames of every item.
        given_settings: their settings when the batch was planned, which are in the items' ids.
        preview_every: steps between previews of an item; 0 makes none.
        factors: colours of previews, on rank 0; None makes none.
    """

    engine: LongVideoEngine
    configs: Mapping[str, RunConfig]
    root: Path
    snapshot_every: int
    keep_latents: bool
    sheets: bool = False
    given: GivenFrames | None = None
    given_settings: Mapping[str, Any] | None = None
    preview_every: int = 0
    factors: PreviewFactors | None = None

    def make(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """Make one item; return its sidecar on rank 0. Every rank calls this with the same task."""
        started, identity, engine = _now(), task["identity"], self.engine
        files = item_files(self.root, identity["variant"], identity["config_id"], task["name"])
        self._use(self.configs[identity["variant"]])
        if engine.is_first:
            _check_root(self.root)
            files.make_folders()
        self._check_given()
        latents, run = denoise_to_file(
            engine,
            identity["prompt"],
            seed=identity["seed"],
            given=self.given,
            file=LatentsFile(path=files.latents, metadata={"item_id": identity["item_id"]})
            if self.keep_latents
            else None,
            snapshot=files.snapshot,
            snapshot_every=self.snapshot_every or engine.config.sampler.steps,
            on_step=lambda finished, total: self.on_step(identity["item_id"], finished, total),
            preview=self._previewer(files.preview),
        )
        if not engine.is_first:
            share_decoding(engine.decoder, latents, seed=identity["seed"])
            return None
        frames, part = _FrameHashes(), files.part(task["token"])
        run = decode_to_files(
            engine.decoder,
            latents,
            run,
            VideoFiles(video=part, sheet=files.sheet if self.sheets else None),
            on_frames=frames.add,
        )
        publishing = time.perf_counter()
        size = {"height": engine.config.video.height, "width": engine.config.video.width}
        output = publish(part, files.video, check=lambda path: check_video(path, num_frames=frames.count, **size))
        run["seconds"] |= {"publish": time.perf_counter() - publishing}
        record = {
            "schema": 1,
            "status": "done",
            **identity,
            "suite": task["suite"],
            "negative_prompt": run["negative_prompt"],
            "output": dataclasses.asdict(output),
            "video": {
                "num_frames": frames.count,
                "native_frames": engine.spec.native_frames(engine.config.method.window_frames),
                "fps": engine.config.video.fps,
                **size,
                **frames.hashes,
            },
            "latents": {"shape": list(latents.shape), "sha256": _latents_sha256(latents)},
            "attempt": task["attempt"],
            "replica": task["replica"],
            "host": socket.gethostname(),
            "started": started,
            "ended": _now(),
            "run": run,
        }
        write_json(files.sidecar, record)
        files.snapshot.unlink(missing_ok=True)
        files.preview.unlink(missing_ok=True)
        return record

    def _previewer(self, path: Path) -> Previewer | None:
        if self.factors is None or not self.preview_every:
            return None
        video = self.engine.config.video
        seconds = video.num_frames / video.fps
        return Previewer(factors=self.factors, path=path, every=self.preview_every, seconds=seconds)

    def _use(self, config: RunConfig) -> None:
        """Switch to the settings of a variant; loaded weights stay."""
        engine, before = self.engine, self.engine.config
        if before == config:
            return
        kernel = engine.kernel
        engine.config = config
        try:
            if before.video != config.video:
                engine.choose_kernel()
            engine.use_method(config.method)
        except UserError:
            engine.config, engine.kernel = before, kernel
            raise

    def _check_given(self) -> None:
        """Raise UserError on all ranks if a given file is no longer the one that the items' ids name."""
        if self.given is None:
            return
        now = self.engine.given_settings(self.given, self.engine.config.video.num_frames)
        if now != self.given_settings:
            raise UserError(
                "a file of --given or --extend has changed since the batch began; put the same file back, or choose "
                "another folder"
            )

    def on_step(self, item: str, finished: int, total: int) -> None:
        """Called on every rank after each step of an item."""


def check_video(path: Path, *, num_frames: int, height: int, width: int) -> None:
    """Raise OSError unless the video decodes to `num_frames` frames of this size."""
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


class _FrameHashes:
    """Counts frames, and hashes the first and the last of them."""

    def __init__(self) -> None:
        self.count = 0
        self.hashes: dict[str, str] = {}

    def add(self, frames: Any) -> None:
        """Frames, uint8 [t, H, W, 3]."""
        if len(frames) == 0:
            return
        if self.count == 0:
            self.hashes["first_frame_sha256"] = hashlib.sha256(frames[0].tobytes()).hexdigest()
        self.hashes["last_frame_sha256"] = hashlib.sha256(frames[-1].tobytes()).hexdigest()
        self.count += len(frames)


def _check_root(root: Path) -> None:
    """Raise FolderGoneError if the batch's folder is gone, such as an unmounted disk."""
    if not (root / FILE).is_file():
        raise FolderGoneError(errno.ENOENT, "the folder of the batch is gone", str(root / FILE))


def _latents_sha256(latents: Tensor) -> str:
    """SHA-256 of the fp32 numbers: equal for equal latents, whatever the file format."""
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
