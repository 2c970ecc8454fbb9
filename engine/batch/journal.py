"""The journal of a batch: a log of JSON lines, a status file for other terminals, and tables of both."""

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from engine.batch.driver import Driver
from engine.batch.locks import lock_file
from engine.files.locks import holder_of
from engine.files.trees import DamagedError, Shape, read_tree
from engine.files.whole import write_json
from engine.shown import describe_seconds, printable

STATUS_SECONDS = 1.0
LAST_FAILURES = 5
STATUS: Shape = {
    "time": int | float,
    "host": str,
    "pid": int,
    "state": str,
    "seconds": int | float,
    "eta": int | float | None,
    "counts": dict,
    "replicas": list,
    "failures": list,
}


class Terminal(Protocol):
    """Shows events and status to the user."""

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of the log."""

    def status(self, tree: Mapping[str, Any]) -> None:
        """A status."""

    def warn(self, message: str) -> None:
        """Show one warning; the batch continues."""


@dataclass
class FileJournal:
    """A `Journal` of the driver that appends to `log` and rewrites `status` each second.

    A file that cannot be written gives one warning, is retried the next time, and does not end the batch.

    Attributes:
        log: file of JSON lines, one per event.
        status: file that `--status` reads.
        already: numbers of items that were done, and given up, before this run.
        terminal: receives every event and every status.
    """

    log: Path
    status: Path
    already: tuple[int, int]
    terminal: Terminal
    _log: int | None = None
    _written: float = 0.0
    _failures: list[dict[str, Any]] = field(default_factory=list)
    _warned: set[Path] = field(default_factory=set)

    def __enter__(self) -> "FileJournal":
        """Return itself; the log is opened at the first event."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the log."""
        self._close()

    def event(self, name: str, **fields: Any) -> None:
        """Append one line to the log."""
        tree = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": name, **fields}
        if name in ("failed", "halted", "ended"):
            shown = {key: value for key, value in fields.items() if key != "traceback"}
            self._failures = [*self._failures, {"time": tree["time"], **shown}][-LAST_FAILURES:]
        try:
            self._append(json.dumps(tree, ensure_ascii=False) + "\n")
        except OSError as error:
            self._close()  # a stale handle does not recover
            self._warn(self.log, error)
        self.terminal.event(tree)

    def tick(self, driver: Driver) -> None:
        """Write the status if the last one is a second old."""
        if time.monotonic() - self._written >= STATUS_SECONDS:
            self.write(driver, "running")

    def write(self, driver: Driver, state: str) -> None:
        """Write the status now; `state` is running, done or stopped."""
        self._written = time.monotonic()
        tree = self.tree(driver, state)
        try:
            self.status.parent.mkdir(exist_ok=True)
            write_json(self.status, tree)
        except OSError as error:
            self._warn(self.status, error)
        self.terminal.status(tree)

    def _append(self, line: str) -> None:
        data = line.encode()
        if self._log is None:
            self.log.parent.mkdir(exist_ok=True)
            self._log = os.open(self.log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            size = os.fstat(self._log).st_size
            if size and os.pread(self._log, 1, size - 1) != b"\n":  # a driver that was killed left half a line
                data = b"\n" + data
        while data:  # a disk that is nearly full takes a part
            data = data[os.write(self._log, data) :]

    def _close(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):
                os.close(self._log)
            self._log = None

    def _warn(self, path: Path, error: OSError) -> None:
        if path not in self._warned:
            self._warned.add(path)
            why = error.strerror or str(error)
            self.terminal.warn(
                f"cannot write {path}: {why}; the batch continues, but --status and the log may be incomplete"
            )

    def tree(self, driver: Driver, state: str) -> dict[str, Any]:
        """The content of the status file."""
        queue, (done, given_up) = driver.queue, self.already
        return {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": state,
            "seconds": driver.clock() - driver.started,
            "eta": driver.eta,
            "counts": {
                "done": done + len(queue.done),
                "running": len(queue.running),
                "waiting": len(queue.waiting),
                "quarantined": given_up + len(queue.given_up),
            },
            "done_now": len(queue.done),
            "replicas": [
                {
                    "name": entry.replica.name,
                    "state": entry.state,
                    "seconds": driver.clock() - entry.since,
                    "item": entry.item.label if entry.item else None,
                    "step": entry.step,
                    "total": entry.total,
                    "done": entry.done,
                }
                for entry in driver.entries
            ],
            "failures": self._failures,
        }


_UNREADABLE: dict[str, Any] = {"seconds": 0.0, "eta": None, "counts": {}, "replicas": [], "failures": []}


def read_status(root: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the status of every shard of a folder, by name; one whose driver has died is `lost`."""
    found = []
    for path in sorted((root / "status").glob("*.json")):
        try:
            tree = read_tree(path, STATUS, what="the status of a batch")
        except DamagedError as error:
            found.append((path.stem, _UNREADABLE | {"state": f"its status cannot be read ({error.reason})"}))
            continue
        if tree is None:  # it has just been taken away
            continue
        if tree["state"] == "running" and holder_of(lock_file(root, path.stem)) is None:
            tree = tree | {"state": "lost", "eta": None}
        found.append((path.stem, tree))
    return found


def table(name: str, tree: Mapping[str, Any], *, note: str | None = None, size: os.terminal_size | None = None) -> str:
    """Format one shard's status as a table, with a note below it, to fit a terminal of `size`.

    A line that the terminal wraps or scrolls away could not be redrawn.
    """
    counts = tree["counts"]
    total = sum(counts.values())
    eta = f"{describe_seconds(tree['eta'])} left" if tree["eta"] is not None else "time left not known yet"
    head = ", ".join(f"{value} {key}" for key, value in counts.items())
    lines = [
        f"{name}: {tree['state']}; {total} items: {head}; {describe_seconds(tree['seconds'])} so far"
        + (f", {eta}" if tree["state"] == "running" else "")
    ]
    rows = [["replica", "state", "item", "step", "for", "done"]]
    for entry in tree["replicas"]:
        step = f"{entry['step']}/{entry['total']}" if entry["total"] else ""
        seconds = describe_seconds(entry["seconds"])
        rows.append([entry["name"], entry["state"], entry["item"] or "", step, seconds, str(entry["done"])])
    below = [
        f"  {failure['time'][11:19]} {failure.get('item') or failure['replica']}: {failure['kind']}: {failure['message']}"
        for failure in tree["failures"]
    ]
    below += [f"  {note}"] if note is not None else []
    # Before lines are counted and cut: an escaped character is longer. A name or message stays on one line.
    lines, replicas, below = ([_one_line(line) for line in part] for part in (lines, columns(rows), below))
    if size is None:
        return "\n".join([*lines, *replicas, *below])
    # The last line stays empty: that is where the cursor waits.
    room = max(size.lines - 1 - len(lines) - len(below), 2)
    if len(replicas) > room:
        states = Counter(entry["state"] for entry in tree["replicas"][room - 2 :])
        rest = ", ".join(f"{count} {state}" for state, count in states.items())
        replicas = [*replicas[: room - 1], f"  and {states.total()} more: {rest}"]
    return "\n".join(line[: size.columns - 1] for line in [*lines, *replicas, *below][: max(size.lines - 1, 1)])


def _one_line(text: str) -> str:
    return printable(text.replace("\n", " ").expandtabs(1))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows of words in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def report(sidecars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Summarise sidecars, a line per method: videos, mean seconds of an item's parts, and bytes."""
    rows = [["method", "config", "videos", "frames", "text s", "denoise s", "decode s", "resumed", "MB"]]
    keys = sorted({(tree["method"], tree["config_id"]) for tree in sidecars})
    for method, config in keys:
        mine = [tree for tree in sidecars if (tree["method"], tree["config_id"]) == (method, config)]
        seconds = {
            part: sum(tree["run"]["seconds"][part] for tree in mine) / len(mine)
            for part in ("text", "denoise", "decode")
        }
        rows.append(
            [
                method,
                config,
                str(len(mine)),
                str(sum(tree["video"]["num_frames"] for tree in mine)),
                *(f"{value:.2f}" for value in seconds.values()),
                str(sum(tree["run"]["resumed_at"] > 0 for tree in mine)),
                f"{sum(tree['output']['bytes'] for tree in mine) / 1e6:.1f}",
            ]
        )
    return columns(rows)
