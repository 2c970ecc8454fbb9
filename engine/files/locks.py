"""Lock files that one process holds at a time, on any file system and across machines, and that name their holder.

A lock file is created together with the name of its holder. The kernel's lock on it (flock) shows whether that process still runs,
and ends with the process. Where flock is missing, or does not cross machines, as on some shared file systems, the holder is
identified by its process id on its own machine, and by its heartbeat elsewhere: it touches the file every few seconds. Clocks of
machines are never compared; times are those of the file system.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import UserError
from engine.files.processes import is_running, start_time, this_place
from engine.files.whole import part_path
from engine.shown import Say, say_on_stderr

BEAT_SECONDS = 1.5
# A holder on another machine is dead if its last heartbeat is older than the first; the second is how long to wait for another.
ALIVE_SECONDS = 60.0
WATCH_SECONDS = 15.0
_POLL_SECONDS = 0.05
_READ_SECONDS = 5.0

_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock file.

    Attributes:
        pid: process id.
        host: name of its machine.
        place: the namespace of the pid, see `engine.files.processes.this_place`.
        started: its start time, see `engine.files.processes.start_time`.
        files: names that it claims, see `engine.files.claims`.
    """

    pid: int
    host: str
    place: str = ""
    started: int | None = None
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.place == this_place() or (not self.place and self.host == socket.gethostname())


class HeldError(UserError):
    """Another process holds a lock file: `who` describes it, `holder` is None if it has not written its name yet."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        self.who = str(holder or "another process")
        self.holder = holder
        super().__init__(f"{self.who} holds {path}")


@contextlib.contextmanager
def hold(path: Path, *, say: Say = say_on_stderr, files: Sequence[str] = ()) -> Iterator[None]:
    """Hold the lock file `path` for the block, and delete it at the end; one that a dead process left is taken over.

    Args:
        path: the lock file; its folder must exist.
        say: prints a line if locks do not work here, and if a holder on another machine is waited for or taken over.
        files: names that are written into it.

    Raises:
        HeldError: a live process holds it.
        OSError: it cannot be written.
    """
    descriptor = _take(path, tuple(files), say)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        _release(path, descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """`hold`, waiting for the current holder without a timeout."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(path, say=lambda _: None))
                break
            except HeldError:
                time.sleep(_POLL_SECONDS)
        yield


def holder_of(path: Path, *, say: Say | None = None) -> Holder | None:
    """Return the live process that holds a lock file, or None.

    With `say`, wait for the next heartbeat of a holder on another machine whose last one is recent; without, it counts as
    live.

    Raises:
        HeldError: a live process holds it that has not written its name yet.
    """
    found = _look(path, say)
    return found.holder if found is not None and found.is_live else None


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An existing lock file: its holder, and whether that process runs."""

    holder: Holder | None
    is_live: bool


def _look(path: Path, say: Say | None) -> _Found | None:
    until = time.monotonic() + _READ_SECONDS
    while True:
        try:
            with _opened(path) as descriptor:
                is_free, holder = _flock(descriptor), _read(descriptor)
        except FileNotFoundError:
            return None
        is_known = holder is not None and not (is_free is False and holder.is_here and not _runs(holder))
        if is_known or is_free:
            return _Found(holder=holder, is_live=is_free is False or _is_alive(path, holder, is_free=is_free, say=say))
        # It is being created or taken over by a process that writes its name next.
        if time.monotonic() > until:
            if is_free is False:
                raise HeldError(path, None)
            return _Found(holder=None, is_live=False)
        time.sleep(_POLL_SECONDS)


def _take(path: Path, files: tuple[str, ...], say: Say) -> int:
    """Create the lock file of this process; returns its descriptor, which holds the kernel's lock if there is one."""
    me = Holder(
        pid=os.getpid(), host=socket.gethostname(), place=this_place(), started=start_time(os.getpid()), files=files
    )
    content = json.dumps(asdict(me) | {"time": time.time()}).encode()
    while True:
        found = _look(path, say)
        if found is not None and found.is_live:
            raise HeldError(path, found.holder)
        if found is not None:
            _remove_dead(path, found.holder, say)
            continue
        if (descriptor := _create(path, content)) is not None:
            if _flock(descriptor) is None:
                say(f"{path.parent} is on a file system without locks; holders are identified by a heartbeat instead")
            return descriptor


def _create(path: Path, content: bytes) -> int | None:
    """Create the lock file with its content; None if another process was faster."""
    part = part_path(path)
    descriptor = _write_new(part, content)
    if descriptor is None:
        return None
    try:
        os.link(part, path)
        return descriptor
    except FileExistsError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without hard links
        os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            return _write_new(path, content)
        return None
    finally:
        part.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> int | None:
    """Create a new file and take the kernel's lock on it; None if another process deleted it as that of a dead one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while _flock(descriptor) is False:  # another process is checking whether it is free
            time.sleep(_POLL_SECONDS)
        if not _has_name(descriptor, path):
            os.close(descriptor)
            return None
        os.write(descriptor, content)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _remove_dead(path: Path, dead: Holder | None, say: Say) -> None:
    """Delete a lock file that a dead process left, unless it was replaced since."""
    try:
        with _opened(path) as descriptor:
            # The kernel's lock on it keeps the other processes of this machine from doing the same.
            is_free = _flock(descriptor)
            if is_free is False or not _has_name(descriptor, path) or _read(descriptor) != dead:
                return
            if dead is not None and not dead.is_here:
                say(f"taking over {path.name} from {dead}, whose heartbeat has stopped")
            if is_free:
                path.unlink()
                return
            # Without that lock the file is renamed first, and renamed back if it is new.
            old = part_path(path)
            path.rename(old)
            if not _has_name(descriptor, old):
                with contextlib.suppress(FileExistsError):
                    os.link(old, path)
            old.unlink()
    except FileNotFoundError:
        pass


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(
        OSError
    ):  # storage that has failed; the file names a process that has ended, as after a kill
        if _has_name(descriptor, path):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.close(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int) -> bool | None:
    """Take the kernel's lock; False if another process has it, None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return None
    return True


def _read(descriptor: int) -> Holder | None:
    """The holder in a lock file; None if it names none."""
    try:
        tree = json.loads(os.pread(descriptor, 1 << 26, 0))
        return Holder(
            pid=int(tree["pid"]),
            host=str(tree["host"]),
            place=str(tree.get("place", "")),
            started=tree.get("started"),
            files=tuple(tree.get("files", ())),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_alive(path: Path, holder: Holder | None, *, is_free: bool | None, say: Say | None) -> bool:
    """Whether the holder of a lock file still runs, if the kernel's lock is free (True) or unsupported (None)."""
    if holder is None:
        return False
    if holder.is_here:
        return is_free is None and _runs(holder)
    try:
        seen = path.stat().st_mtime
        age = _file_system_time(path.parent) - seen
    except FileNotFoundError:
        return False
    if say is None or age > ALIVE_SECONDS:
        return 0 <= age <= ALIVE_SECONDS
    say(f"waiting up to {WATCH_SECONDS:.0f} s for a heartbeat of {holder}, which holds {path.name}")
    return _beats(path, seen)


def _beats(path: Path, seen: float) -> bool:
    """Whether a lock file is touched again; it is reopened each time, since network file systems refresh only then."""
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(min(BEAT_SECONDS / 3, WATCH_SECONDS / 10))
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime != seen:
                    return True
        except FileNotFoundError:
            return False
    return False


def _runs(holder: Holder) -> bool:
    return is_running(holder.pid, holder.started)


def _file_system_time(folder: Path) -> float:
    """The current time of a folder's file system, whose clock on a network is another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a server may not answer for a moment; the next beat may be in time
            os.utime(descriptor)
