"""A rank that dies, hangs, is interrupted or cannot write: the others end within seconds, and what was computed is kept."""

import errno
import io
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import engine.decode.tiles
import engine.engine
from engine.hooks.self_attention import BranchProcessor
from engine.media.write_video import VideoWriter
from engine.paths import REPOSITORY
from launch.cli.start import run_script
from launch.process import stopping
from launch.process.environment import LAUNCHER
from launch.process.streams import RankLines
from launch.video import remaining
from tests.launch.conftest import Run
from tests.launch.forked import PATIENCE_SECONDS, run_forked
from tests.launch.test_generate import names
from tests.launch.test_ranks import SCRIPT, TILED, latents_of, prompted

# What a collective may take where all processes of a busy machine stand still together for seconds.
TIMEOUT_SECONDS = 30
# Within the model's rotary table, and 64 TiB of noise.
TOO_LARGE = {"video.height": 8192, "video.width": 8192, "video.num_frames": 4093}


def kill_myself(*_args: object, **_kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class InAttention:
    """`rank` does `what` in step 2, layer 1, before it takes part in that layer's collectives."""

    rank: int
    what: Callable[[], None]

    def __call__(self, rank: int) -> None:
        attend = BranchProcessor.__call__

        def fail(processor: BranchProcessor, *args: object, **kwargs: object) -> object:
            if rank == self.rank and (processor.state.last.step, processor.layer) == (2, 1):
                self.what()
            return attend(processor, *args, **kwargs)

        BranchProcessor.__call__ = fail


def die_while_loading(rank: int) -> None:
    if rank == 1:
        engine.engine.load_pipeline = kill_myself


def die_while_decoding(rank: int) -> None:
    decode_step, calls = engine.decode.tiles.decode_step, []

    def fail(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if rank == 1 and len(calls) > 9:
            kill_myself()
        return decode_step(*args, **kwargs)

    engine.decode.tiles.decode_step = fail


def fill_disk(rank: int) -> None:
    def fail(self: VideoWriter, frames: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    VideoWriter.write = fail


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def interrupt_while_decoding(rank: int) -> None:
    write, calls = VideoWriter.write, []

    def stop(self: VideoWriter, frames: np.ndarray) -> None:
        calls.append(frames)
        if len(calls) == 3:
            interrupt()
        write(self, frames)

    VideoWriter.write = stop


def limit_memory(_rank: int) -> None:
    """So that nothing is promised which is not there, whatever the machine's rule of overcommitment; the disk has room."""
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))
    remaining.check_free_space = lambda *_, **__: None


def sleep_long() -> None:
    time.sleep(3600)


@pytest.fixture(scope="module")
def whole(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The latents of two ranks that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = run_forked([prompted(wan_folder, folder / "a.mp4")] * 2, folder)
    assert [rank.code for rank in ended] == [0, 0], ended
    return latents_of(folder / "a.mp4")


def test_a_rank_that_dies_in_load(wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ended = run_forked([prompted(wan_folder, folder / "a.mp4")] * 3, tmp_path, fault=die_while_loading)
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL, 1]
    assert ended[0].err.startswith("error: rank 0, agreement at start: all-gather"), ended
    assert ended[0].err.count("\n") == 1
    assert ended[2].err == ""
    assert names(folder) == set()


def test_a_rank_that_dies_in_a_collective(wan_folder: Path, whole: torch.Tensor, tmp_path: Path) -> None:
    """Rank 0 says where it noticed, keeps the steps that were done, and the same command ends in the same bits."""
    folder = tmp_path / "out"
    command = prompted(wan_folder, folder / "a.mp4")
    ended = run_forked([command] * 2, tmp_path, fault=InAttention(1, kill_myself))
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    assert ended[0].err.startswith("error: rank 0, step 2 layer 1: "), ended
    assert "after step 2, which is kept in" in ended[0].err
    assert ended[0].err.count("\n") == 1
    assert names(folder) == {"a.snapshot.safetensors"}

    ended = run_forked([command] * 2, tmp_path)
    assert "(continued after step 2)" in ended[0].out, ended
    assert torch.equal(latents_of(folder / "a.mp4"), whole)


def test_a_rank_that_dies_in_decode(
    run: Callable[..., Run], wan_folder: Path, whole: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    ended = run_forked([prompted(wan_folder, folder / "a.mp4", TILED)] * 2, tmp_path, fault=die_while_decoding)
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL]
    assert ended[0].err.startswith("error: rank 0, decode, latent frame "), ended
    assert ended[0].err.count("\n") == 1
    assert torch.equal(latents_of(folder / "a.mp4"), whole)
    assert names(folder) == {"a.safetensors"}
    command = shlex.split(ended[0].err.partition("make the video with: ")[2])
    assert run("decode", *command[2:]).code == 0


def test_a_rank_that_hangs_is_named_with_step_layer_and_operation(wan_folder: Path, tmp_path: Path) -> None:
    command = prompted(wan_folder, tmp_path / "out" / "a.mp4", {"parallel.timeout": TIMEOUT_SECONDS})
    ended = run_forked([command] * 2, tmp_path, fault=InAttention(1, sleep_long), kill_when_first_ended=True)
    assert [rank.code for rank in ended] == [1, None]
    assert ended[0].err.startswith("error: rank 0, step 2 layer 1: "), ended
    assert " among ranks [0, 1] failed: " in ended[0].err
    assert "imed out" in ended[0].err
    assert ended[0].err.count("\n") == 1


def test_a_rank_that_never_comes(wan_folder: Path, tmp_path: Path) -> None:
    command = prompted(wan_folder, tmp_path / "out" / "a.mp4", {"parallel.timeout": 15})
    ended = run_forked([command] * 2, tmp_path, world=3, ranks=[0, 2])
    assert [rank.code for rank in ended] == [2, 2]
    assert ended[0].err == "error: only 2 of 3 ranks came within 15 s; rank 0 waited\n"
    assert "error:" not in ended[1].err  # torch may log that rank 0 has left
    assert names(tmp_path / "out") == set()


def test_a_rank_0_that_never_comes(wan_folder: Path, tmp_path: Path) -> None:
    """One line, from the waiting rank, since rank 0 does not exist."""
    command = prompted(wan_folder, tmp_path / "out" / "a.mp4", {"parallel.timeout": 1})
    [only] = run_forked([command], tmp_path, world=2, ranks=[1])
    assert only.code == 2
    assert only.err.startswith("error: rank 1 of 2 cannot reach rank 0 at 127.0.0.1:"), only
    assert " within 1 s ([Errno 111] Connection refused); start all ranks" in only.err
    assert only.err.count("\n") == 1, only
    assert names(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "RANK must be a whole number, 0 or more, got 'x'; unset RANK, LOCAL_RANK and",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a"}, "LOCAL_RANK must be a whole number, 0 or more, got 'a'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number, 0 or more, got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number, 0 or more, got ''"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK 0 must be less than WORLD_SIZE 0"),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK 5 must be less than WORLD_SIZE 1"),
    ],
)
def test_an_environment_that_names_no_rank(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    try:
        assert run_script("generate") == 2
    finally:
        for number, handler in zip(stopping.SIGNALS, before, strict=True):
            signal.signal(number, handler)
    err = capfd.readouterr().err
    assert err.startswith(f"error: {said}"), err
    assert err.count("\n") == 1


def test_every_line_of_a_verbose_rank_has_its_number() -> None:
    shown = io.StringIO()
    lines = RankLines(shown, 3)
    print("one\ntwo", file=lines)
    lines.write("\r10 %")
    lines.write("\r20 %")
    print(" done", file=lines)
    assert shown.getvalue() == "[rank 3] one\n[rank 3] two\n[rank 3] \r10 %\r20 % done\n"


def test_memory_that_runs_out_is_one_line_on_every_rank(tmp_path: Path) -> None:
    """Of a CPU, whose allocator raises a plain RuntimeError: both ranks ask for the same 64 TiB of noise."""
    command = prompted(REPOSITORY / "tiny/wan", tmp_path / "out" / "a.mp4", TOO_LARGE)
    ended = run_forked([command] * 2, tmp_path, fault=limit_memory)
    assert {rank.code for rank in ended} <= {1, 2}, ended
    for rank in ended:
        assert rank.err.count("\n") <= 1, ended
    assert ended[0].err.startswith("error: out of memory while denoising on cpu ("), ended
    assert "a shorter or smaller video would fit" in ended[0].err
    assert names(tmp_path / "out") == set()


def test_a_full_disk_ends_all_ranks(wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ended = run_forked([prompted(wan_folder, folder / "a.mp4", TILED)] * 2, tmp_path, fault=fill_disk)
    assert [rank.code for rank in ended] == [2, 1], ended
    assert ended[0].err.startswith(f"error: cannot write {folder / 'a.mp4'}: No space left on device; the latents are")
    assert (ended[0].err.count("\n"), ended[1].err) == (1, "")
    assert names(folder) == {"a.safetensors"}


def test_an_interruption_keeps_the_steps(wan_folder: Path, whole: torch.Tensor, tmp_path: Path) -> None:
    """Rank 0 is stopped; the others would not be, as rank 0 might wait for them in the middle of a step."""
    folder = tmp_path / "out"
    command = prompted(wan_folder, folder / "a.mp4")
    ended = run_forked([command] * 2, tmp_path, fault=InAttention(0, interrupt))
    assert [rank.code for rank in ended] == [130, 1], ended
    assert ended[0].err.startswith("stopped: after step 2, which is kept in "), ended
    assert (ended[0].err.count("\n"), ended[1].err) == (1, "")
    assert names(folder) == {"a.snapshot.safetensors"}

    ended = run_forked([command] * 2, tmp_path, fault=InAttention(1, interrupt))
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "(continued after step 2)" in ended[0].out
    assert torch.equal(latents_of(folder / "a.mp4"), whole)


def stop_at_the_end(rank: int) -> None:
    """SIGTERM as this rank takes its process group down, when every file is whole; the same again as it exits."""
    destroy = torch.distributed.destroy_process_group

    def stop(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        destroy(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.distributed.destroy_process_group = stop


def test_a_rank_that_is_stopped_at_the_very_end_is_no_failure(wan_folder: Path, tmp_path: Path) -> None:
    command = prompted(wan_folder, tmp_path / "out" / "a.mp4")
    ended = run_forked([command] * 3, tmp_path, fault=stop_at_the_end)
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 3, ended
    assert {"a.mp4", "a.png", "a.json"} <= names(tmp_path / "out")


def test_an_interruption_while_decoding_keeps_the_latents(
    wan_folder: Path, whole: torch.Tensor, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    ended = run_forked([prompted(wan_folder, folder / "a.mp4", TILED)] * 2, tmp_path, fault=interrupt_while_decoding)
    assert [rank.code for rank in ended] == [130, 1], ended
    assert ended[0].err.startswith("stopped: while decoding; the latents are kept in "), ended
    assert torch.equal(latents_of(folder / "a.mp4"), whole)
    assert names(folder) == {"a.safetensors"}


# The launcher, with ranks that do as they are told and import nothing slow.

RANK = """
import os, signal, sys, time
from launch.process.stopping import StopSignals, die_with_parent, say

die_with_parent()
signals = StopSignals()
signals.install()
what = sys.argv[1 + int(os.environ["RANK"])]
os.write(1, b"started\\n")  # one write, whatever the buffering: ranks share this pipe
try:
    signals.release()
    if what == "wait":
        time.sleep(600)
    if what == "stubborn":
        signals.leave()
        time.sleep(600)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fault":
        raise ValueError("a bug")
    if what == "mistake":
        say("error: a mistake")
        sys.exit(2)
    if what == "lost":
        time.sleep(0.5)
        say("error: rank 0, step 1 layer 0: lost a peer")
        sys.exit(1)
except KeyboardInterrupt:
    say("stopped: kept")
    sys.exit(signals.code)
"""
LAUNCHER_SCRIPT = """
import resource
import signal
import sys
from launch.ranks import launcher, watch
from launch.process.stopping import StopSignals

# Long enough for ranks that end by themselves, on a busy machine too; short for those that do not.
watch.GRACE_SECONDS, watch.STOP_SECONDS = (1.0 if "wait" in sys.argv else 200.0), (10.0 if "stubborn" in sys.argv else 200.0)
if "files" in sys.argv:
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
signals = StopSignals()
signals.install()
signals.release()
sys.exit(launcher.start_ranks(len(sys.argv) - 2, sys.argv[1:], signals=signals))
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`launch("wait", "killed")`: a launcher of two ranks, in a process group of its own. None of them outlives the test."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(*actions: str) -> subprocess.Popen:
        command = [sys.executable, "-c", LAUNCHER_SCRIPT, str(tmp_path / "rank.py"), *actions]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, **pipes, text=True, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE_SECONDS)
    assert_none_left(str(tmp_path / "rank.py"))


def assert_none_left(text: str) -> None:
    """No process with this text in its command line is left, or will be in a moment."""
    until = time.monotonic() + PATIENCE_SECONDS / 4
    while found := [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if text in _read(path)]:
        assert time.monotonic() < until, found
        time.sleep(0.05)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has just ended
        return ""


def wait_until_started(process: subprocess.Popen, ranks: int) -> None:
    for _ in range(ranks):
        assert process.stdout.readline().startswith("started")


@pytest.mark.parametrize(
    ("actions", "code", "lines"),
    [
        (["done", "done"], 0, []),
        (["mistake", "mistake"], 2, ["error: a mistake"]),
        (["wait", "mistake"], 2, ["error: a mistake"]),
        (["lost", "mistake"], 2, ["error: a mistake"]),
        (["lost", "wait"], 1, ["error: rank 0, step 1 layer 0: lost a peer"]),
        (
            ["wait", "killed", "done"],
            1,
            ["error: rank 1 of 3 (process ", ") was ended by SIGKILL, as the system does "],
        ),
        (["lost", "killed"], 1, ["SIGKILL", "; the other ranks were stopped; rank 0, step 1 layer 0: lost a peer"]),
        (["lost", "fault"], 1, ["[rank 1] Traceback", "failed with exit code 1 (ValueError: a bug)", "lost a peer"]),
        # Rank 0 ends well once everything is made; what happens to another one then is no failure.
        (["done", "killed", "done"], 0, ["note: rank 1 of 3 was ended by SIGKILL", " after all work was done"]),
        (["done", "fault"], 0, ["note: rank 1 of 2 failed with exit code 1 (ValueError: a bug) after all work was"]),
    ],
)
def test_how_a_run_ends(
    launch: Callable[..., subprocess.Popen], actions: list[str], code: int, lines: list[str]
) -> None:
    process = launch(*actions)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, err
    assert [line for line in lines if line not in err] == []
    own = [line for line in err.splitlines() if not line.startswith("[rank 1] ")]
    assert len(own) == (1 if lines else 0), err


def test_more_ranks_than_the_machine_lets_start(launch: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    process = launch(*["wait"] * 30, "files")
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    found = re.fullmatch(
        r"error: rank (\d+) of 31 cannot be started on this machine \(Too many open files\); give a smaller --nproc, or raise .*\n",
        err,
    )
    assert found is not None, err
    assert 1 < int(found[1]) < 16
    assert_none_left(str(tmp_path / "rank.py"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_launcher(launch: Callable[..., subprocess.Popen], number: signal.Signals, code: int) -> None:
    process = launch("wait", "stubborn")
    wait_until_started(process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (code, "stopped: kept\n")


def test_under_nohup_a_terminal_that_closes_ends_nothing(launch: Callable[..., subprocess.Popen]) -> None:
    process = launch("wait", "wait", "nohup")
    wait_until_started(process, 3)
    os.killpg(process.pid, signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (143, "stopped: kept\n")


def test_a_terminal_s_ctrl_c_twice(launch: Callable[..., subprocess.Popen]) -> None:
    """It goes to the whole group of processes."""
    process = launch("wait", "wait")
    wait_until_started(process, 2)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (130, "stopped: kept\n")


def test_a_rank_that_does_not_stop_is_ended(launch: Callable[..., subprocess.Popen]) -> None:
    process = launch("stubborn", "wait")
    wait_until_started(process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, err) == (143, "stopped\n")


def test_no_rank_outlives_a_launcher_that_was_killed(launch: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    process = launch("wait", "stubborn")
    wait_until_started(process, 2)
    process.kill()
    assert_none_left(str(tmp_path / "rank.py"))


# The whole way.


def begin(command: Sequence[str], tmp_path: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(SCRIPT), *command], cwd=tmp_path, env=environment, **pipes, text=True)


def wait_for_step(process: subprocess.Popen, text: str) -> list[str]:
    """What stderr has shown when `text` was on it; the rest is read meanwhile, or the process would wait."""
    shown: list[str] = []
    for line in process.stderr:  # a bar's carriage returns end lines here
        shown.append(line)
        if text in line:
            return shown
    raise AssertionError(shown)


def child_of(process: subprocess.Popen, rank: int) -> int:
    """Process id of a rank, as soon as it has started."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        for path in Path("/proc").glob("[0-9]*/environ"):
            variables = _read(path).split("\0")
            if f"{LAUNCHER}={process.pid}" in variables and f"RANK={rank}" in variables:
                return int(path.parent.name)
    raise AssertionError("no such rank")


@pytest.mark.slow
def test_a_run_whose_rank_is_killed_and_that_is_then_interrupted(wan_folder: Path, tmp_path: Path) -> None:
    """Rank 1 is killed, the same command continues and is stopped by Ctrl-C twice, and ends in the bits of a whole run."""
    more = {"sampler.num_steps": 150, "output.progress": "on"}
    command = [*prompted(wan_folder, tmp_path / "a.mp4", more), "--nproc=2"]

    process = begin(command, tmp_path)
    wait_for_step(process, " 2/150")
    os.kill(child_of(process, 1), signal.SIGKILL)
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, rest
    said = rest.splitlines()[-1]
    assert said.startswith("error: rank 1 of 2 (process "), rest
    assert "was ended by SIGKILL" in said
    assert "; rank 0, step " in said
    assert "the same command continues from there" in said
    assert "Traceback" not in rest
    assert names(tmp_path) == {"a.snapshot.safetensors"}

    process = begin(command, tmp_path)
    first = wait_for_step(process, "denoise")[-1]
    assert " 0/150" not in first
    wait_for_step(process, "mode=")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, rest
    assert rest.splitlines()[-1].startswith("stopped: after step "), rest
    assert "Traceback" not in rest
    assert_none_left(str(tmp_path / "a.mp4"))

    whole = tmp_path / "b.mp4"
    more |= {"output.progress": "off"}
    for target in (tmp_path / "a.mp4", whole):
        ended = run_forked([prompted(wan_folder, target, more)] * 2, tmp_path)
        assert [rank.code for rank in ended] == [0, 0], ended
    assert torch.equal(latents_of(tmp_path / "a.mp4"), latents_of(whole))


def test_a_script_begins_without_slow_imports() -> None:
    """Or a Ctrl-C in the first seconds would show a traceback, and a launcher would hold hundreds of megabytes."""
    code = (
        "import launch.cli.start, sys; sys.exit(len({'torch', 'numpy', 'diffusers', 'jsonargparse'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_ctrl_c_during_the_imports_is_one_line(wan_folder: Path, tmp_path: Path) -> None:
    """Sent as soon as torch is being loaded, to a process alone and to a launcher."""
    for nproc in ([], ["--nproc=2"]):
        process = begin([*prompted(wan_folder, tmp_path / "a.mp4"), *nproc], tmp_path)
        watched = child_of(process, 0) if nproc else process.pid
        while "torch" not in _read(Path(f"/proc/{watched}/maps")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        assert (process.returncode, out, err) == (130, "", "stopped\n")
    assert_none_left(str(tmp_path / "a.mp4"))
