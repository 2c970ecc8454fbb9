"""Run another program with a log and a time limit, and end it with its children."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_LAST_LINES = 2000  # characters of a log that are searched for its last line


def run_process(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, time_limit: float, stop: threading.Event
) -> str | None:
    """Run a command with its output appended to a log; return None on success, else a description of the failure.

    It runs in a new process group, which is ended as a whole after `time_limit` or when `stop` is set.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + time_limit
            while (code := child.poll()) is None and not stop.is_set() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        finally:
            _end(child)
    if code is None:
        return "was stopped" if stop.is_set() else f"took longer than {time_limit:g} s"
    if code == 0:
        return None
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"{how}: {_last_line(log)}"


def _end(child: subprocess.Popen) -> None:
    """End a process group, even if its leader has ended."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        if child.poll() is not None:
            continue  # the leader is gone: what it left behind gets no grace
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")[-_LAST_LINES:]
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("$ ")]
    return f"{lines[-1][:200]} ({log})" if lines else f"see {log}"
