"""Ranks of one machine listen on its loopback device alone, however they are started."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch.ranks import join as ranks
from tests.launch.forked import PATIENCE_SECONDS, start_forked
from tests.launch.test_ranks import SCRIPT, TORCHRUN, prompted

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

LISTENS = "0A"


def listening(pid: int) -> set[str]:
    """Addresses at which a process listens, as /proc/PID/net has them: hexadecimal, IPv4 in the machine's order of bytes."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))
        except FileNotFoundError:
            continue
        inodes |= {found[1]} if found else set()
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == LISTENS and line[9] in inodes}


def is_loopback(address: str) -> bool:
    """Whether an address of /proc/net is 127.0.0.1, ::1 or ::ffff:127.0.0.1, whose bytes stand in words of the machine's order."""
    words = [bytes.fromhex(address[start : start + 8]) for start in range(0, len(address), 8)]
    raw = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return raw in (b"\x7f\0\0\1", bytes(15) + b"\1", bytes(10) + b"\xff\xff\x7f\0\0\1")


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return [pid, *(each for child in children for each in descendants(child))]


STARTS = {
    "--nproc": [sys.executable, str(SCRIPT), "--nproc=2"],
    "torchrun": [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=static", "--master-addr=127.0.0.1", str(SCRIPT)],
}


def no_interface(_rank: int) -> None:
    """As in a shell where nobody has chosen one."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)


@pytest.fixture
def endless(wan_folder: Path, tmp_path: Path) -> list[str]:
    """The words for a video that takes minutes."""
    return prompted(wan_folder, tmp_path / "a.mp4", {"sampler.num_steps": 5000, "output.snapshot_every": 1})


def assert_listen_on_loopback_alone(ranks_of: Sequence[int]) -> None:
    found = {pid: listening(pid) for pid in ranks_of}
    assert all(found.values()), found  # each rank of gloo listens somewhere
    beyond = {pid: addresses for pid in ranks_of if (addresses := {x for x in found[pid] if not is_loopback(x)})}
    assert beyond == {}


def wait_for_steps(folder: Path, alive: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not (folder / "a.snapshot.safetensors").exists():
        assert time.monotonic() < until
        assert alive()
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["--nproc", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_listen_on_loopback_alone(how: str, endless: list[str], tmp_path: Path) -> None:
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in own.items() if name not in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    process = subprocess.Popen(
        [*STARTS[how], *endless], cwd=tmp_path, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for_steps(tmp_path, lambda: process.poll() is None)
        pids = [pid for pid in descendants(process.pid) if b"generate.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert_listen_on_loopback_alone(pids[-2:])
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)


def test_ranks_that_another_program_starts_listen_on_loopback_alone(endless: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    processes = [
        start_forked(["generate", *endless], tmp_path, place=place | {"RANK": rank}, rank=rank, fault=no_interface)
        for rank in range(2)
    ]
    try:
        wait_for_steps(tmp_path, lambda: all(process.is_alive() for process in processes))
        assert_listen_on_loopback_alone([process.pid or 0 for process in processes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_the_ranks_choose_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a host's name is an address that others reach, gloo would listen there; an interface that somebody set stays."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    ranks.listen_on_loopback()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "lo")


class Store:
    """What ranks have said of their networks."""

    def __init__(self, *networks: str) -> None:
        self._said = {f"network/{rank}": network.encode() for rank, network in enumerate(networks)}

    def set(self, name: str, value: str) -> None:
        assert self._said[name] == value.encode()

    def get(self, name: str) -> bytes:
        return self._said[name]


@pytest.mark.parametrize(("other", "shared"), [(None, True), ("another boot", False), ("", False)])
def test_machines_that_only_share_a_name_keep_their_network(other: str | None, shared: bool) -> None:
    mine = ranks.describe_network()
    rank_env = ranks.RankEnv(rank=0, world=2, local_rank=0)
    assert ranks._share_loopback(Store(mine, mine if other is None else other), rank_env) is shared


def test_negative_control_listener_beyond_loopback() -> None:
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("127.0.0.1", 0)):
        found = listening(os.getpid())
    assert sorted(map(is_loopback, found)) == [False, True]
