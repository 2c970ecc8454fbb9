"""Control characters in the text of others are shown, not sent to the terminal."""

import contextlib
import io
import os
import subprocess
import sys

import pytest

from engine.batch.journal import table
from engine.files.locks import say_on_stderr
from engine.paths import REPOSITORY
from engine.progress import note
from engine.shown import PrintableStream, apart, printable, quoted
from launch.batching.terminal import Terminal
from launch.process.stopping import say, show

CLEAR = "\x1b[2J\x1b]0;title\x07"
SHOWN = r"\x1b[2J\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('it\'s "a" 雪\tstar\n', 'it\'s "a" 雪\tstar\n'),
        (CLEAR, SHOWN),
        ("a\rb\x08\x7f", r"a\rb\x08\x7f"),
        ("\x9b2J\x85", r"\x9b2J\x85"),
        ("gp.\u202e4pm\u2066", r"gp.\u202e4pm\u2066"),
        ("name\udcff", r"name\udcff"),
    ],
)
def test_controls_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert quoted(text) == f'"{shown}"'
    stream = io.StringIO()
    assert PrintableStream(stream).write(text) == len(text)
    assert stream.getvalue() == shown


@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ((1.26, 1.34), ["1.26", "1.34"]),
        ((21.98, 22.02), ["21.98", "22.02"]),
        ((21.0, 22.0), ["21.0", "22.0"]),
        ((22.0, 22.0), ["22.0", "22.0"]),
        ((100.0, 100.0 + 2**-30), ["100.000000000", "100.000000001"]),
    ],
)
def test_different_sizes_look_different(sizes: tuple[float, float], shown: list[str]) -> None:
    assert apart(*(size * 2**30 for size in sizes)) == shown


@pytest.mark.parametrize("tell", [say, show, note, say_on_stderr])
def test_lines_on_stderr(tell: object, capsys: pytest.CaptureFixture[str]) -> None:
    tell(f"error: {CLEAR}")
    assert capsys.readouterr().err.strip() == f"error: {SHOWN}"


def test_the_table_of_a_batch() -> None:
    """A status file is of another process, perhaps of another machine; each of its texts stays one line."""
    replica = {"name": f"r{CLEAR}", "state": "a\nb", "seconds": 4.0, "item": CLEAR, "step": 1, "total": 2, "done": 0}
    failure = {
        "item": f"x{CLEAR}",
        "message": f"y\n{CLEAR}",
        "replica": CLEAR,
        "kind": CLEAR,
        "time": "2026-01-01T10:11:12",
    }
    tree = {"time": 0.0, "host": CLEAR, "pid": 1, "state": f"run{CLEAR}", "seconds": 5.0, "eta": None}
    tree |= {"counts": {"done": 2, "running": 0}, "replicas": [replica], "failures": [failure]}
    plain = table(f"batch{CLEAR}", tree)
    for character in "\x1b\x07\r":
        assert character not in plain
    assert SHOWN in plain
    assert "a b" in plain


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_the_table_of_a_terminal_is_drawn_over_and_shows_what_names_hold() -> None:
    tree = {
        "time": 0.0,
        "host": "h",
        "pid": 1,
        "state": CLEAR,
        "seconds": 5.0,
        "eta": None,
        "replicas": [],
        "failures": [],
    }
    tree |= {"counts": {"done": 2, "running": 0}}
    screen = Screen()
    with contextlib.redirect_stdout(PrintableStream(screen)):
        terminal = Terminal(total=2)
        terminal.status(tree)
        assert "\x1b" not in screen.getvalue()
        terminal.status(tree)
    assert screen.getvalue().count("\x1b") == 2  # one line up, and clear what is below
    assert "\x1b[2F\x1b[J" in screen.getvalue()
    assert SHOWN in screen.getvalue()


def test_broken_pipe_does_not_end_the_command() -> None:
    """After `| head` a command continues its work and ends silently."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        with pytest.raises(BrokenPipeError):
            os.write(writing, b"x")
        stream = PrintableStream(pipe)
        for _ in range(3):
            assert stream.write("a line\n" * 10_000) == 70_000
            stream.flush()


@pytest.mark.parametrize("words", [["generate", "--help"], ["generate", "--help_all"], []])
def test_closed_output_pipe(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "launch", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            check=False,
        )
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")
