"""A rank of a replica: loads the model once, then makes the items that come on stdin, one JSON line each.

The first line is the setup: `configs` (a whole RunConfig for each variant by its label, which differ in
`engine.batch.variants.MAY_DIFFER` alone), `root` (the batch's folder), `checkpoint_every`, `keep_latents`.
The others are tasks: `identity`, `suite`, `attempt`, `replica`. What happens is told on the pipe of `launch.ranks.host`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch import Tensor

from engine.batch.check import check_video
from engine.batch.files import BatchFiles, item_files
from engine.batch.items import FILE
from engine.batch.queue import Kind
from engine.batch.store import publish
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError, describe_out_of_memory, is_out_of_memory
from engine.files.storage import FolderGoneError, is_storage_fault, names_storage_fault
from engine.files.video import VideoFiles
from engine.files.whole import write_json
from engine.produce import LatentsFile, decode_to_files, denoise_to_file, share_decoding
from launch.latents_record import restore_config
from launch.process.exit_codes import LostRankError, run_command
from launch.process.stopping import StopSignals, die_with_parent
from launch.process.streams import unfailing_streams
from launch.ranks.environment import EVENTS
from launch.ranks.join import open_ranks
from parallel.collectives import CollectiveError


def main() -> int:
    """Run until stdin ends, or something that the group of ranks does not survive has happened."""
    signals = StopSignals()
    signals.install()
    with unfailing_streams(), os.fdopen(int(os.environ[EVENTS]), "w", buffering=1, encoding="utf-8") as pipe:
        return run_command(lambda _: _work(pipe), [], signals=signals)


def _work(pipe: IO[str]) -> None:
    def tell(event: str, **fields: Any) -> None:
        pipe.write(json.dumps({"event": event, **fields}) + "\n")

    started = time.perf_counter()
    setup = json.loads(sys.stdin.readline() or "null")
    if setup is None:
        return
    configs = {label: restore_config(tree, Path(setup["root"])) for label, tree in setup["configs"].items()}
    config = next(iter(configs.values()))
    with open_ranks(config, prompts=[setup["root"]], verbose=False) as context:
        context.check_on_first(lambda: refuse_unshared(Path(setup["root"])))
        with contextlib.closing(LongVideoEngine(config, context.ranks)) as engine:
            worker = Worker(
                engine=engine,
                configs=configs,
                root=Path(setup["root"]),
                checkpoint_every=setup["checkpoint_every"],
                keep_latents=setup["keep_latents"],
                tell=tell,
            )
            engine.text.keep(BatchFiles(root=worker.root).text_cache)
            layout = engine.layout
            nodes = ", ".join(f"{each['node']} ({len(each['ranks'])})" for each in layout["nodes"])
            place = f"{engine.device} on {nodes}, {layout['ranks']} ranks, {layout['why']}"
            tell("ready", seconds=time.perf_counter() - started, place=place)
            for line in sys.stdin:
                worker.run(json.loads(line))


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What a rank makes items with; `tell` hands an event to the driver."""

    engine: LongVideoEngine
    configs: Mapping[str, RunConfig]
    root: Path
    checkpoint_every: int
    keep_latents: bool
    tell: Callable[..., None]

    def run(self, task: dict[str, Any]) -> None:
        """Make one item and tell how that went. Raises whatever leaves the other ranks in another place than this one."""
        item = task["identity"]["item_id"]
        try:
            record = self.make(task)
        except BaseException as error:
            # A UserError is raised by all ranks together; after anything else nobody knows where the others are.
            whole = isinstance(error, UserError)
            fields = {"kind": kind_of(error), "message": describe(error), "traceback": traceback.format_exc()}
            if not isinstance(error, KeyboardInterrupt):
                self.tell("failed", item=item, whole=whole, **fields)
            if not whole:
                raise
        else:
            self.tell("done", item=item, record=record)

    def make(self, task: dict[str, Any]) -> dict[str, Any] | None:
        """One item from noise to its sidecar, which is returned on rank 0. Every rank calls this with the same task."""
        started, identity = _now(), task["identity"]
        engine = self.engine
        files = item_files(self.root, identity["variant"], identity["config_id"], task["name"])
        self._use(self.configs[identity["variant"]])
        if engine.is_first:
            check_root(self.root)
            files.make_folders()
        latents, run = denoise_to_file(
            engine,
            identity["prompt"],
            seed=identity["seed"],
            file=LatentsFile(path=files.latents, metadata={"item_id": identity["item_id"]})
            if self.keep_latents
            else None,
            checkpoint=files.checkpoint,
            checkpoint_every=self.checkpoint_every,
            on_step=lambda finished, total: self._tell_step(identity["item_id"], finished, total),
        )
        if not engine.is_first:
            share_decoding(engine.decoder, latents, seed=identity["seed"])
            return None
        frames, part = _FrameHashes(), files.part(task["token"])
        run = decode_to_files(engine.decoder, latents, run, VideoFiles(video=part), on_frames=frames.add)
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
        files.checkpoint.unlink(missing_ok=True)
        return record

    def _use(self, config: RunConfig) -> None:
        """Denoise with the settings of a variant from now on; all that is loaded stays."""
        engine, before = self.engine, self.engine.config
        if before == config:
            return
        engine.config = config
        try:
            engine.use_method(config.method)
        except UserError:
            engine.config = before
            raise

    def _tell_step(self, item: str, finished: int, total: int) -> None:
        if self.engine.is_first:
            self.tell("step", item=item, finished=finished, total=total)


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


def refuse_unshared(root: Path) -> None:
    """Raise UserError if this machine does not see the batch's folder, which its driver has written to already."""
    if not (root / FILE).is_file():
        raise UserError(
            f"{root} does not hold the batch's {FILE} on {socket.gethostname()}; --out must lie on a file system that all "
            "nodes share"
        )


def check_root(root: Path) -> None:
    """Raise FolderGoneError if the batch's folder is not there any more: what is written now would land beside it."""
    if not (root / FILE).is_file():
        raise FolderGoneError(errno.ENOENT, "the folder of the batch is gone", str(root / FILE))


def kind_of(error: BaseException) -> Kind:
    """Which sort of failure an exception is."""
    if is_storage_fault(error):
        return "disk"
    if isinstance(error, UserError):  # the engine turns an OSError of one rank into one line for all
        return "disk" if names_storage_fault(str(error)) else "mistake"
    if is_out_of_memory(error):
        return "memory"
    if isinstance(error, CollectiveError | LostRankError | dist.DistError):
        return "lost"
    return "fault"


def describe(error: BaseException) -> str:
    """One line for a person, with what would help."""
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    first = re.sub(r"^\[Errno \d+\] ", "", first)
    match kind_of(error):
        case "memory":
            return describe_out_of_memory(error, when="making an item")
        case "fault":
            return f"{type(error).__name__}: {first}"
        case _:
            return first


def _latents_sha256(latents: Tensor) -> str:
    """SHA-256 of the fp32 numbers: equal for equal latents, whatever the file format."""
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


if __name__ == "__main__":
    die_with_parent()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take its process group down a rank that failed would have to wait for the others
