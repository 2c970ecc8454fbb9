"""Progress of a batch on the terminal: a live table, a line per item, or `--status` from elsewhere."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.batch.items import FILE
from engine.batch.journal import read_status, table
from engine.errors import UserError
from engine.shown import describe_seconds, printable


class Terminal:
    """Show progress: a table that is redrawn each second on a terminal, otherwise a line per item."""

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._done = 0
        self._lines = 0
        self._note: str | None = None
        self._live = sys.stdout.isatty()

    def event(self, event: Mapping[str, Any]) -> None:
        """Print a line for each item that ended, unless there is a table; the table shows failures and the last note."""
        if event["event"] == "done":
            self._done += 1
        if self._live:
            if event["event"] == "note":
                self._note = f"{event['time'][11:19]} {event['replica']}: {event['message']}"
            return
        if event["event"] == "done":
            took = describe_seconds(event["seconds"])
            print(f"{event['item']}: done in {took} on {event['replica']} ({self._done} of {self._total})", flush=True)
        elif event["event"] == "failed":
            after = "given up" if event["verdict"] == "quarantine" else "will be tried again"
            print(f"{event['item']}: failed on {event['replica']}, {after}: {event['message']}", flush=True)
        elif event["event"] in ("ended", "note"):
            print(f"{event['replica']}: {event['message']}", flush=True)

    def status(self, tree: Mapping[str, Any]) -> None:
        """Redraw the table."""
        if not self._live:
            return
        text = table("batch", tree, note=self._note, size=shutil.get_terminal_size())
        if self._lines:
            _move_up(self._lines)
        print(text, flush=True)
        self._lines = text.count("\n") + 1

    def warn(self, message: str) -> None:
        """Print a warning on stderr, or below the table."""
        if self._live:
            self._note = message
            return
        print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


def _move_up(lines: int) -> None:
    """Move the cursor up and clear what is below it, bypassing the stream that escapes control characters."""
    getattr(sys.stdout, "stream", sys.stdout).write(f"\x1b[{lines}F\x1b[J")


def show_status(root: Path) -> int:
    """Print the state of every shard of a folder."""
    try:
        found = read_status(root)
    except OSError as error:
        raise UserError(f"cannot look into --status {root}: {error.strerror}") from error
    if not found and (root / FILE).is_file():
        print(f"{root} has a batch but no status: no driver has started an item yet")
        return 0
    if not found:
        raise UserError(f"{root} holds no batch; give the --out folder of a batch")
    for name, tree in found:
        print(table(name, tree))
    return 0
