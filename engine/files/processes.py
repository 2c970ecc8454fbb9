"""Identify processes of this machine, and check whether they still run."""

import functools
import hashlib
import os
import socket
from pathlib import Path


@functools.cache
def this_place() -> str:
    """Eight hex digits for the namespace of this process's id: this boot of the machine, and this container.

    Host names do not suffice: containers of one machine may share a name and have process ids of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        found = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux, or /proc is hidden
        found = socket.gethostname()
    return hashlib.sha256(found.encode()).hexdigest()[:8]


def start_time(pid: int) -> int | None:
    """The start of a process of this machine, in clock ticks since boot, which distinguishes it from a later one of its id.

    None if there is no such process, or it is a zombie; 0 if the system does not say.
    """
    try:
        # The name, in parentheses, may hold anything; the state is the first field after it, the start the twentieth.
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else int(fields[18])
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except ProcessLookupError:  # it ended while it was read
        return None
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it is another user's
        return 0
    return 0


def is_running(pid: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs, with this start time if given."""
    now = start_time(pid)
    return now is not None and (started in (None, 0) or now in (0, started))
