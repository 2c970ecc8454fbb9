"""The jobs of a service: items of a batch with a file each, written before a client hears that its job is accepted.

Queries are answered from memory, which the driver's thread updates. All methods are thread-safe.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.batch.files import SIDECAR, BatchFiles
from engine.errors import UserError
from engine.files.trees import DamagedError, Shape, read_tree
from engine.files.whole import atomic_path, sweep, write_json
from engine.shown import say_on_stderr
from engine.text.cache import trim
from launch.serving.planner import Planned, Planner
from launch.serving.requests import Offer, RefusedError, VideoRequest

Status = Literal["queued", "in_progress", "completed", "failed"]
SHAPE: Shape = {
    "created": float,
    "request": dict,
    "request.prompt": str,
    "request.method": str,
    "request.height": int,
    "request.width": int,
    "request.num_frames": int,
    "request.seed": int,
    "request.picture": str | None,
}
PREFIX = "video_"
# Embeddings of texts that stay on the disk: 8 MiB each for Wan's encoder.
MOST_TEXTS = 256


@dataclass(eq=False)
class Job:
    """One accepted request and its state.

    Attributes:
        step: steps that are done, of `total`.
        lost: whether an attempt has failed.
        preview: when its preview was written, in ms.
    """

    planned: Planned
    created: float
    status: Status = "queued"
    step: int = 0
    total: int = 0
    completed: float | None = None
    error: str | None = None
    lost: bool = False
    preview: int | None = None

    @property
    def name(self) -> str:
        """The id that clients know: that of the item."""
        return PREFIX + self.planned.item.item_id

    def shown(self, offer: Offer) -> dict[str, Any]:
        """OpenAI's `Video`, with our fields behind it."""
        request = self.planned.request
        percent = 100 if self.status == "completed" else 99 * self.step // self.total if self.total else 0
        return {
            "id": self.name,
            "object": "video",
            "model": offer.model,
            "status": self.status,
            "progress": percent,
            "preview": self.preview if self.status == "in_progress" else None,
            "created_at": int(self.created),
            "completed_at": None if self.completed is None else int(self.completed),
            "expires_at": None,
            "size": f"{request.width}x{request.height}",
            "seconds": offer.seconds(request.num_frames),
            "prompt": request.prompt,
            "remixed_from_video_id": None,
            "error": None if self.error is None else {"code": "video_generation_failed", "message": self.error},
            "method": request.method,
            "seed": request.seed,
            "extra": dict(request.extra),
            "num_frames": request.num_frames,
        }


@dataclass
class Jobs:
    """The jobs of a folder.

    Attributes:
        files: the folder.
        planner: plans requests.
        most: most jobs that wait or run.
        wake: set when the driver has something new to do.
        pace: seconds of the last video, for `Retry-After`.
        leaving: cancelled jobs whose item still runs, by item_id.
    """

    files: BatchFiles
    planner: Planner
    most: int
    wake: threading.Event = field(default_factory=threading.Event)
    pace: float = 10.0
    leaving: dict[str, Job] = field(default_factory=dict)
    _jobs: dict[str, Job] = field(default_factory=dict)
    _new: list[Job] = field(default_factory=list)
    # Lock order: the first, held while a job is added or removed, which may be slow; then the second, which queries wait for.
    _changing: threading.RLock = field(default_factory=threading.RLock)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def folder(self) -> Path:
        """The files of the accepted jobs."""
        return self.files.root / "jobs"

    def cancel_file(self, item_id: str) -> Path:
        """The file whose existence cancels an item at its next step."""
        return self.files.root / "cancelled" / item_id

    def open(self) -> None:
        """Read the jobs of an earlier start, and delete leftovers of cancelled ones; unfinished jobs wait again."""
        for folder in (self.folder, self.planner.pictures, self.cancel_file("x").parent):
            folder.mkdir(exist_ok=True)
            sweep(folder)
        for path in self.cancel_file("x").parent.iterdir():
            path.unlink()
        found = [job for path in sorted(self.folder.glob("*.json")) if (job := self._read(path)) is not None]
        for job in sorted(found, key=lambda job: job.created):
            item = job.planned.item
            self._jobs[item.item_id] = job
            if self.files.is_done(item, "size"):
                self._complete(job)
            elif (failed := self.files.quarantined(item)) is not None:
                job.status, job.error = "failed", failed["error"]
            else:
                self._new.append(job)
        done = [job.planned.item for job in found if job.status == "completed"]
        todo = [job.planned.item for job in self._new]
        self.files.tidy(done=done, todo=todo)
        kept = {path for item in todo for path in (self.files.of(item).snapshot, self.files.of(item).preview)}
        for folder in self.files.root.glob("*/*/unfinished"):
            sweep(folder)
            # Snapshots have another ending in folders of older versions.
            for left in (*folder.glob("*.safetensors"), *folder.glob("*.preview.webp")):
                if left not in kept:
                    left.unlink(missing_ok=True)
        for path in self.planner.pictures.iterdir():
            self._drop_picture(path.name)

    def _read(self, path: Path) -> Job | None:
        """Read a job; None, with a printed line, if it can no longer be read or made."""
        try:
            tree = read_tree(path, SHAPE, what="a job")
            if tree is None:
                return None
            planned = self.planner.plan(
                VideoRequest(
                    **{key: tree["request"][key] for key in _REQUEST if key != "extra"},
                    extra=tree["request"].get("extra", {}),
                )
            )
            if planned.item.item_id != path.stem:
                raise DamagedError(f"{path} holds another video than its name states")
        except (UserError, KeyError) as error:
            say_on_stderr(f"left out: {path}: {error}")
            return None
        return Job(planned=planned, created=tree["created"])

    def accept(self, request: VideoRequest, picture: bytes | None = None) -> dict[str, Any]:
        """Accept a request, or find the job of an equal one; a job that failed is tried again.

        Raises UserError for a request that cannot be made, with status 429 if too many jobs wait.
        """
        with self._changing, self._kept(request.picture, picture):
            planned = self.planner.plan(request)
            item_id = planned.item.item_id
            before = self._jobs.get(item_id)
            if before is not None and before.status != "failed":
                return self.shown(before)
            self._check_room(item_id)
            job = Job(planned=planned, created=time.time())
            self.files.release(planned.item)
            write_json(
                self.folder / f"{item_id}.json",
                {"created": job.created, "request": dataclasses.asdict(planned.request)},
            )
            with self._lock:
                self._jobs.pop(item_id, None)  # so that it is the newest
                self._jobs[item_id] = job
                self._new.append(job)
            self.wake.set()
            return self.shown(job)

    def _check_room(self, item_id: str) -> None:
        """Raise RefusedError if too many jobs wait, or the item is one that is being cancelled."""
        if item_id in self.leaving:
            raise RefusedError("this video is just being cancelled; ask again in a moment", status=409, wait=1)
        if (count := self.num_open) >= self.most:
            raise RefusedError(
                f"{count} jobs wait or run, and --most_jobs is {self.most}; ask again later",
                status=429,
                code="rate_limit_exceeded",
                wait=max(1, round(min(self.pace, 600.0))),
            )

    @contextlib.contextmanager
    def _kept(self, name: str | None, data: bytes | None) -> Iterable[None]:
        """Keep a client's picture in the folder, unless the block fails and no other job has it."""
        if name is not None and data is not None:
            with atomic_path(self.planner.pictures / name) as part:
                part.write_bytes(data)
        try:
            yield
        except BaseException:
            self._drop_picture(name)
            raise

    def _drop_picture(self, name: str | None) -> None:
        if name is not None and name not in self._pictures():
            (self.planner.pictures / name).unlink(missing_ok=True)

    def _pictures(self) -> set[str | None]:
        """The pictures of a job."""
        with self._lock:
            return {job.planned.request.picture for job in (*self._jobs.values(), *self.leaving.values())}

    @property
    def num_open(self) -> int:
        """Jobs that wait or run, cancelled ones that still run included."""
        with self._lock:
            return sum(job.status in ("queued", "in_progress") for job in self._jobs.values()) + len(self.leaving)

    def counts(self) -> Mapping[str, int]:
        """Jobs by status."""
        with self._lock:
            states = [job.status for job in self._jobs.values()]
        return {status: states.count(status) for status in ("queued", "in_progress", "completed", "failed")}

    def shown(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        with self._lock:
            return job.shown(self.planner.offer)

    def find(self, name: str) -> Job:
        """The job of this id; RefusedError with status 404 if there is none."""
        with self._lock:
            job = self._jobs.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
        if job is None:
            raise RefusedError(f"there is no video {name[:60]!r}", status=404, code="not_found", param="video_id")
        return job

    def page(self, *, limit: int, newest_first: bool, after: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Up to `limit` jobs by age, after the one of this id, and whether more follow."""
        with self._lock:
            every = list(self._jobs.values())[:: -1 if newest_first else 1]
            start = 0 if after is None else every.index(self.find(after)) + 1
        return [self.shown(job) for job in every[start : start + limit]], len(every) > start + limit

    def delete(self, name: str) -> None:
        """Forget a job and delete its files; one that runs ends at its next step."""
        with self._changing, self._lock:
            job = self.find(name)
            item = job.planned.item
            (self.folder / f"{item.item_id}.json").unlink(missing_ok=True)
            del self._jobs[item.item_id]
            if job in self._new:
                self._new.remove(job)
                self._delete_files(job)
            elif job.status in ("queued", "in_progress"):
                self.leaving[item.item_id] = job
                self.cancel_file(item.item_id).touch()
                self.wake.set()
            else:
                self._delete_files(job)

    def take_new(self) -> list[Job]:
        """The jobs that the driver does not know yet."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def job_of(self, item_id: str) -> Job | None:
        """The job of an item, also of one that is being cancelled."""
        with self._lock:
            return self._jobs.get(item_id) or self.leaving.get(item_id)

    def move(self, item_id: str, step: int, total: int) -> None:
        """Record that an item runs, and its progress."""
        job = self.job_of(item_id)
        if job is None or (job.status, job.step) == ("in_progress", step):
            return
        try:
            preview = self.files.of(job.planned.item).preview.stat().st_mtime_ns // 1_000_000
        except FileNotFoundError:
            preview = None
        with self._lock:
            job.status, job.step, job.total, job.preview = "in_progress", step, total, preview

    def end(self, item_id: str, *, error: str | None = None, again: bool = False) -> None:
        """Record that an item is done, failed with `error`, or waits for another attempt; delete it if it was cancelled."""
        with self._changing, self._lock:
            leaving = self.leaving.pop(item_id, None) if not again else None
            job = self._jobs.get(item_id)
            if leaving is not None:
                self._delete_files(leaving)
            elif job is not None and again:
                job.status, job.step, job.lost = "queued", 0, True
            elif job is not None and error is not None:
                job.status, job.error = "failed", error
                self.files.drop_parts(job.planned.item)
                self.files.of(job.planned.item).preview.unlink(missing_ok=True)
            elif job is not None:
                self._complete(job)
                trim(self.files.text_cache, MOST_TEXTS)
                if job.lost:
                    self.files.drop_parts(job.planned.item)

    def record(self, job: Job) -> dict[str, Any] | None:
        """The sidecar of a finished job."""
        return read_tree(self.files.of(job.planned.item).sidecar, SIDECAR, what="the sidecar of a video")

    def _complete(self, job: Job) -> None:
        job.status, job.completed = "completed", self.files.of(job.planned.item).sidecar.stat().st_mtime

    def _delete_files(self, job: Job) -> None:
        item = job.planned.item
        files = self.files.of(item)
        for path in (
            files.sidecar,
            files.video,
            files.sheet,
            files.snapshot,
            files.preview,
            self.cancel_file(item.item_id),
        ):
            path.unlink(missing_ok=True)
        self.files.drop_parts(item)
        self.files.release(item)
        self._drop_picture(job.planned.request.picture)


_REQUEST = tuple(each.name for each in dataclasses.fields(VideoRequest))
