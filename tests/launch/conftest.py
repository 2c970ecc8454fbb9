"""A checkpoint with random weights, and commands run in this process, as a person sees them: code, stdout, stderr."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.cli.start import run_here
from launch.process.exit_codes import run_command
from tests.launch.warm import WarmServer
from tests.tiny_pipelines import save_random_wan

SMALL = {
    "video.num_frames": 17,
    "video.height": 32,
    "video.width": 32,
    "sampler.num_steps": 4,
    "method.window_frames": 3,
    "method.freespec.domain": "step",  # by timestep all of so few steps would fuse, which every command says
    "output.sheet_frames": 4,
}


# The embedded LTX-Video in place of the small Wan: two steps of one forward each, since both passes are one batch.
LTX = {"model.path": Path(__file__).parent.parent.parent / "tiny" / "ltx", "sampler.num_steps": 2}


@dataclass(frozen=True)
class Run:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What follows `error: ` on stderr, which must be one line and all there is."""
        assert self.code == 2, self
        assert self.out == "", self
        assert self.err.startswith("error: "), self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        return self.err.removeprefix("error: ").strip()

    @property
    def stopped(self) -> str:
        """What follows `stopped: `, likewise."""
        assert self.err.startswith("stopped: "), self
        assert self.err.count("\n") == 1, self
        return self.err.removeprefix("stopped: ").strip()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on many threads, and much slower where the machine has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as in a terminal: tests may have been started to ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights."""
    return save_random_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    """The process that `warm_ranks` are forked from."""
    server = WarmServer(tmp_path_factory.mktemp("warm"))
    yield server
    server.close()


@pytest.fixture
def warm_ranks(warm_server: WarmServer, monkeypatch: pytest.MonkeyPatch) -> WarmServer:
    """The ranks of replicas that this process starts are forked; those of a driver that is a process of its own are started."""
    stand_in = SimpleNamespace(Popen=warm_server.popen, PIPE=subprocess.PIPE)
    monkeypatch.setattr("launch.ranks.host.subprocess", stand_in)
    return warm_server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """`run(command, *argv)`: a command, by name or as a function, in this process. Exceptions that it does not turn into a line pass through."""

    def call(command: str | Callable[[list[str]], int | None], *argv: object) -> Run:
        capsys.readouterr()
        try:
            main = partial(run_here, command) if isinstance(command, str) else command
            code = run_command(main, [str(word) for word in argv])
        except SystemExit as stop:  # --help and --print_config
            code = stop.code or 0
        shown = capsys.readouterr()
        return Run(code, shown.out, shown.err)

    return call


@pytest.fixture
def make(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """`make({setting: value}, *argv)`: generate.py on the small checkpoint; writes tmp_path/a.mp4 if nothing else is said."""

    def call(settings: dict[str, object] | None = None, *argv: object) -> Run:
        chosen = {"model.path": wan_folder, "output.path": tmp_path / "a.mp4"} | SMALL | (settings or {})
        prompt = [] if any(str(word).startswith("--prompt") for word in argv) else ["--prompt", "a red circle"]
        words = [f"--{key}={value}" for key, value in chosen.items()]
        return run("generate", *words, *prompt, *argv)

    return call
