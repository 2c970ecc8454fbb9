"""A rank of a replica: load the model once, then make the items that arrive on stdin, one JSON line each.

The first line is the setup: `configs` (a whole RunConfig for each variant by its label, which differ in
`engine.batch.variants.MAY_DIFFER` alone), `root` (the batch's folder), `snapshot_every`, `keep_latents`, `sheets`, `given` (see
`GivenFrames.arguments`), `given_settings`, `preview_every`, `preview_factors`.
The others are tasks: `identity`, `suite`, `attempt`, `replica`; those of a service also bring their own `config`, `given` and
`given_settings`, and `cancel`, a file that cancels the item once it exists. Events go to the pipe of `launch.ranks.host`.
"""

import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import torch.distributed as dist

from engine.batch.files import BatchFiles
from engine.batch.items import FILE
from engine.batch.make import ItemMaker
from engine.batch.queue import Kind
from engine.decode.preview import PreviewFactors, find_factors
from engine.engine import LongVideoEngine
from engine.errors import UserError, describe_out_of_memory, first_line, is_out_of_memory
from engine.files.storage import is_storage_fault, names_storage_fault
from engine.given.frames import parse_given
from engine.ranks.agreement import from_first
from launch.process.environment import EVENTS
from launch.process.exit_codes import LostRankError, run_command
from launch.process.stopping import StopSignals
from launch.process.streams import unfailing_streams
from launch.ranks.join import DistContext, open_ranks
from launch.video.latents_record import restore_config
from parallel.collectives import CollectiveError


def main() -> int:
    """Run until stdin ends, or an error ends the group of ranks."""
    signals = StopSignals()
    signals.install()
    with unfailing_streams(), os.fdopen(int(os.environ[EVENTS]), "w", buffering=1, encoding="utf-8") as pipe:
        return run_command(lambda _: _work(pipe), [], signals=signals)


def run() -> NoReturn:
    """Run `main` as this process."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed rank that destroyed its process group would wait for the others


def _work(pipe: IO[str]) -> None:
    def emit(event: str, **fields: Any) -> None:
        pipe.write(json.dumps({"event": event, **fields}) + "\n")

    started = time.perf_counter()
    setup = json.loads(sys.stdin.readline() or "null")
    if setup is None:
        return
    configs = {label: restore_config(tree, Path(setup["root"])) for label, tree in setup["configs"].items()}
    config = next(iter(configs.values()))
    given = None if setup["given"] is None else parse_given(**setup["given"])
    with open_ranks(config, prompts=[setup["root"]], verbose=False, given=given) as context:
        context.check_on_first(lambda: refuse_unshared(Path(setup["root"])))
        with LongVideoEngine(config, context.ranks) as engine:
            worker = Worker(
                engine=engine,
                configs=configs,
                root=Path(setup["root"]),
                snapshot_every=setup["snapshot_every"],
                keep_latents=setup["keep_latents"],
                sheets=setup["sheets"],
                given=given,
                given_settings=setup["given_settings"],
                preview_every=setup["preview_every"],
                emit=emit,
            )
            worker = worker.with_previews(context, setup["preview_factors"])
            engine.text.keep(BatchFiles(root=worker.root).text_cache)
            layout = engine.facts.parallel
            nodes = ", ".join(f"{each['node']} ({len(each['ranks'])})" for each in layout["nodes"])
            place = f"{engine.device} on {nodes}, {layout['ranks']} ranks, {layout['why']}"
            emit("ready", seconds=time.perf_counter() - started, place=place)
            for line in sys.stdin:
                worker.run(json.loads(line))


@dataclass(frozen=True, kw_only=True)
class Worker(ItemMaker):
    """A rank of a replica; `emit` sends an event to the driver."""

    emit: Callable[..., None]
    cancel: Path | None = None

    def with_previews(self, context: DistContext, path: str | None) -> Self:
        """Add the preview factors of its VAE, on rank 0; sends a note to the driver if there are none."""
        found: list[PreviewFactors | None] = [None]

        def find() -> None:
            found[0] = find_factors(self.engine.pipe.vae, None if path is None else Path(path))
            if found[0] is None:
                self.emit("note", text="no previews for this VAE; fit its colours with previews.py")

        if self.preview_every:
            context.check_on_first(find)
        return replace(self, factors=found[0])

    def of(self, task: dict[str, Any]) -> Self:
        """The worker for a task: with the task's own settings, or itself for a task without any."""
        if "config" not in task:
            return self
        return replace(
            self,
            configs={task["identity"]["variant"]: restore_config(task["config"], self.root)},
            given=None if task["given"] is None else parse_given(**task["given"]),
            given_settings=task["given_settings"],
            cancel=Path(task["cancel"]),
        )

    def run(self, task: dict[str, Any]) -> None:
        """Make one item and report the result; re-raises errors after which the ranks are out of step."""
        item = task["identity"]["item_id"]
        try:
            record = self.of(task).make(task)
        except BaseException as error:
            # A UserError is raised on all ranks together; after any other error the ranks are out of step.
            whole = isinstance(error, UserError)
            fields = {"kind": kind_of(error), "message": describe(error), "traceback": traceback.format_exc()}
            if not isinstance(error, KeyboardInterrupt):
                self.emit("failed", item=item, whole=whole, **fields)
            if not whole:
                raise
        else:
            self.emit("done", item=item, record=record)

    def on_step(self, item: str, finished: int, total: int) -> None:
        """Emit the driver that a step of an item is done; CancelledError, on all ranks, if the item was cancelled."""
        cancel = self.cancel
        if self.engine.is_first:
            self.emit("step", item=item, finished=finished, total=total)
        if cancel is not None and from_first(self.engine.mesh, lambda: b"x" if cancel.exists() else b"", "cancel"):
            raise CancelledError("cancelled")


class CancelledError(UserError):
    """The item was cancelled; raised on all ranks together."""


def refuse_unshared(root: Path) -> None:
    """Raise UserError if this machine does not see the batch's folder, to which the driver has written."""
    if not (root / FILE).is_file():
        raise UserError(
            f"{root} does not hold the batch's {FILE} on {socket.gethostname()}; --out must be on a file system that all "
            "nodes share"
        )


def kind_of(error: BaseException) -> Kind:
    """Return the kind of failure of an exception."""
    if isinstance(error, CancelledError):
        return "cancelled"
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
    """Describe an exception in one line, with advice."""
    first = re.sub(r"^\[Errno \d+\] ", "", first_line(error))
    match kind_of(error):
        case "memory":
            return describe_out_of_memory(error, when="making an item", of_folder=True)
        case "fault":
            return f"{type(error).__name__}: {first}"
        case _:
            return first
