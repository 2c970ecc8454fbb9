"""Ranks of replicas that start quickly: `subprocess.Popen` for `launch.ranks.host`, by forks of a process that has imported all.

A rank has its pipes, its session, its environment and its working directory as a started one has them, it is killed and waited for as
such, and its parent waits for it alone. Only Python's start and its imports are left out. What a start itself
decides is tested without this: `tests/launch/ranks`, `tests/launch/test_ranks.py` and `tests/launch/test_faults.py`.
"""

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from select import select
from typing import IO, Any

from launch.process.environment import EVENTS, LAST_LINE, LAUNCHER, STORE
from launch.process.stopping import SIGNALS, die_with_parent
from launch.ranks.local import WORKER
from tests.launch.forked import PATIENCE_SECONDS
from tests.ranks import PRELOAD

_PR_SET_PDEATHSIG = 1
_STREAMS = ("stdin", "stdout", "stderr")
_DESCRIPTORS = (EVENTS, LAST_LINE, STORE)


class WarmProcess:
    """What `launch.ranks.host` uses of a Popen."""

    def __init__(self, server: str, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self.returncode: int | None = None
        self._lock = threading.Lock()
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(server)
        socket.send_fds(self._connection, [b"x"], list(descriptors))
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        with self._lock:
            if self.returncode is None and select([self._connection], [], [], 0)[0]:
                self.returncode = int(self._answers.readline())
                self._connection.close()
            return self.returncode

    def wait(self) -> int:
        """Wait for the end."""
        while (code := self.poll()) is None:
            with contextlib.suppress(ValueError):  # closed by another thread's poll
                select([self._connection], [], [], 1.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send the process a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


_STARTED: list[tuple[WarmProcess, dict[str, str]]] = []


def running() -> dict[int, dict[str, str]]:
    """The environments of the forked ranks that run, by process id."""
    _STARTED[:] = [each for each in _STARTED if each[0].poll() is None]
    return {process.pid: environment for process, environment in _STARTED}


class WarmServer:
    """The process that ranks are forked from."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "warm")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(target=serve, args=(self.address,), daemon=True)
        self._process.start()
        until = time.monotonic() + PATIENCE_SECONDS
        while not Path(self.address).exists():
            assert self._process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)

    def popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None,
        pass_fds: Sequence[int],
        start_new_session: bool,
        **streams: Any,
    ) -> Any:
        """`subprocess.Popen` of a worker; other commands start as they do without this."""
        if tuple(command[1:]) != WORKER:
            return subprocess.Popen(
                command, env=env, cwd=cwd, pass_fds=pass_fds, start_new_session=start_new_session, **streams
            )
        ours: dict[str, int] = {}
        theirs: list[int] = []
        opened: list[int] = []
        for kind in _STREAMS:
            stream = streams[kind]
            if stream == subprocess.PIPE:
                reading, writing = os.pipe()
                own, other = (writing, reading) if kind == "stdin" else (reading, writing)
                ours[kind] = own
                opened.append(other)
                theirs.append(other)
            else:
                theirs.append({"stdout": 1, "stderr": 2}[kind] if stream is None else stream.fileno())
        named = [name for name in _DESCRIPTORS if name in env]
        request = {"env": dict(env), "cwd": cwd or str(Path.cwd()), "descriptors": named}
        process = WarmProcess(self.address, request, [*theirs, *(int(env[name]) for name in named)])
        for descriptor in opened:
            os.close(descriptor)
        for kind, descriptor in ours.items():
            setattr(process, kind, os.fdopen(descriptor, "wb" if kind == "stdin" else "rb", 0))
        _STARTED.append((process, dict(env)))
        return process

    def close(self) -> None:
        """End it and what it has forked."""
        self._process.kill()
        self._process.join()


def serve(address: str) -> None:
    """Fork a process for every connection until this one is killed."""
    _die_with_parent()
    worker = importlib.import_module("launch.batching.worker")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen(64)
        Path(f"{address}.new").rename(address)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                _keep(connection, worker)
            connection.close()


def _keep(connection: socket.socket, worker: Any) -> None:
    """Fork the rank, say its process id, and say how it ends; like a started one it dies with this process, its parent."""
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 16)
    request = json.loads(connection.makefile().readline())
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            _become(request, descriptors, parent, connection)
            worker.run()
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(70)
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        connection.sendall(f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], descriptors: list[int], parent: int, connection: socket.socket) -> None:
    """Take the place of a started process."""
    connection.close()
    os.setsid()
    os.chdir(request["cwd"])
    for target, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["env"] | {LAUNCHER: str(parent)})
    os.environ.update({name: str(number) for name, number in zip(request["descriptors"], descriptors[3:], strict=True)})
    # multiprocessing has put others into their place.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.argv = [WORKER[1]]
    die_with_parent()
    importlib.import_module("torch").set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
