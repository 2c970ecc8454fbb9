"""A full disk or a reader that has left costs what is printed, and nothing else."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.process.streams import Unfailing
from tests.launch.conftest import SMALL
from tests.launch.forked import run_forked

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")


def fill(descriptor: int) -> None:
    """Make a descriptor one that takes nothing."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)


def abandon(descriptor: int) -> None:
    """Make a descriptor a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.dup2(writing, descriptor)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(("lose", "number"), [(fill, errno.ENOSPC), (abandon, errno.EPIPE)])
def test_an_unfailing_stream_ends_nothing(lose: Callable[[int], None], number: int, tmp_path: Path) -> None:
    """Neither while it is written to nor when Python flushes it at exit; the stream itself raises."""
    with (tmp_path / "file").open("w") as stream:
        lose(stream.fileno())
        unfailing = Unfailing(stream)
        for text in ("a line\n", "a long one" * 10_000):
            print(text, file=unfailing, flush=True)
        with pytest.raises(OSError, match=os.strerror(number)):
            stream.flush()
        unfailing.close()
        stream.flush()
    assert unfailing.error is not None
    assert unfailing.error.errno == number


def test_a_stream_that_works_again_is_used_again(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as stream:
        kept = os.dup(stream.fileno())
        unfailing = Unfailing(stream)
        fill(stream.fileno())
        print("one", file=unfailing, flush=True)
        os.dup2(kept, stream.fileno())
        print("two", file=unfailing, flush=True)
        unfailing.close()
        os.close(kept)
    assert (tmp_path / "file").read_text() == "one\ntwo\n"


def fill_stdout(_rank: int) -> None:
    fill(1)


def abandon_stdout(_rank: int) -> None:
    abandon(1)


def fill_both(_rank: int) -> None:
    fill(1)
    fill(2)


LOST = "warning: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize(("lose", "said"), [(fill_stdout, LOST), (abandon_stdout, ""), (fill_both, "")])
def test_every_prompt_is_made_though_nothing_can_be_printed(
    wan_folder: Path, tmp_path: Path, lose: Callable[[int], None], said: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    given = SMALL | {
        "model.path": wan_folder,
        "prompts": tmp_path / "prompts.txt",
        "output.path": tmp_path / "a.mp4",
    }
    (ended,) = run_forked([[f"--{name}={value}" for name, value in given.items()]], tmp_path, fault=lose)
    assert (ended.code, ended.err) == (0, said), ended
    assert len(list(tmp_path.glob("*.mp4"))) == len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize(("lose", "said"), [(fill_stdout, LOST), (abandon_stdout, "")])
def test_a_batch_is_made_though_nothing_can_be_printed(
    wan_folder: Path, tmp_path: Path, lose: Callable[[int], None], said: str
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    of_one = {"output.sheet_frames"}
    given = {name: value for name, value in SMALL.items() if name not in of_one} | {"model.path": wan_folder}
    given |= {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "out"}
    words = [f"--{name}={value}" for name, value in given.items()]
    (ended,) = run_forked([words], tmp_path, fault=lose, script="batch")
    assert (ended.code, ended.err) == (0, said), ended
    assert len(list(tmp_path.glob("out/*/*/videos/*.mp4"))) == 1


def test_a_plan_that_cannot_be_printed_is_an_error(tmp_path: Path) -> None:
    (ended,) = run_forked([["--config=tiny-wan", "--gpu=h200"]], tmp_path, fault=fill_stdout, script="plan")
    assert (ended.code, ended.err) == (2, "error: cannot write to stdout: No space left on device\n"), ended
