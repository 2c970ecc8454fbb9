"""Ranks of torchrun that are started anew: a store that knows former ranks, agents that count differently, and a real run."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.denoise.snapshot import kept_steps
from engine.errors import UserError
from launch.process.environment import RankEnv
from launch.ranks.join import gather_ranks
from tests.launch.test_ranks import SCRIPT, TORCHRUN, latents_of, prompted

WORLD = 3
PATIENCE_SECONDS = 300.0


@pytest.fixture
def port() -> Iterator[int]:
    """Of a store that outlives its ranks, as an agent of torchrun holds it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def gather(port: int, ranks: list[int], world: int, *, timeout: float = 200.0) -> dict[int, dist.Store | Exception]:
    """What each rank, a thread with a connection of its own, ends with."""
    ended: dict[int, dist.Store | Exception] = {}

    def come(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout))
        try:
            ended[rank] = gather_ranks(store, RankEnv(rank=rank, world=world, local_rank=rank), timeout)
        except UserError as error:
            ended[rank] = error

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=timeout + 60)
    return ended


def test_every_start_of_the_ranks_has_a_store_of_its_own(port: int) -> None:
    """Whatever was left by starts before it, of as many ranks, of more and of fewer."""
    for turn, world in enumerate((WORLD, WORLD, WORLD + 1, 2, WORLD)):
        ended = gather(port, [*range(world)], world)
        stores = [ended[rank] for rank in range(world)]
        for rank, store in enumerate(stores):
            assert not store.check(["said"])
            store.set(f"of {rank}", str(turn))
        for store in stores:
            assert [store.get(f"of {rank}") for rank in range(world)] == [str(turn).encode()] * world
        stores[0].set("said", "")


def test_a_rank_that_does_not_come_is_not_taken_for_its_predecessor(port: int) -> None:
    """Its name is still there; the others wait for it, and say how many came."""
    gather(port, [*range(WORLD)], WORLD)
    ended = gather(port, [0, 2], WORLD, timeout=10.0)
    assert str(ended[0]) == "only 2 of 3 ranks came within 10 s; rank 0 waited"
    assert str(ended[2]) == "only 2 of 3 ranks came within 10 s; rank 2 waited"
    assert all(isinstance(store, dist.Store) for store in gather(port, [2, 1, 0], WORLD).values())


@pytest.mark.slow
def test_a_machine_of_torchrun_is_lost_and_another_takes_its_place(wan_folder: Path, tmp_path: Path) -> None:
    """The agent that stays counts a restart, the new one none; the run goes on from its snapshot to the same video."""
    steps = {"sampler.num_steps": 200, "parallel.timeout": 120}
    whole, video = tmp_path / "whole/a.mp4", tmp_path / "out/a.mp4"
    subprocess.run([sys.executable, str(SCRIPT), *prompted(wan_folder, whole, steps)], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    nodes += [f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"]
    command = [*TORCHRUN, *nodes, str(SCRIPT), *prompted(wan_folder, video, steps)]
    # With a store that agents share, torchrun itself waits for ever for an agent that takes another's place.
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def start(name: str) -> subprocess.Popen:
        with (tmp_path / name).open("w") as log:
            return subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)

    stays = start("stays")
    with contextlib.ExitStack() as stack:
        stack.callback(end, stays)
        wait_until(lambda: listens(endpoint), stays, tmp_path / "stays")  # the first to come holds the agents' store
        lost = start("lost")
        stack.callback(end, lost)
        kept = video.with_name("a.snapshot.safetensors")
        wait_until(lambda: kept_steps(kept) > 0, stays, tmp_path / "stays")
        lost.kill()
        lost.wait()
        comes = start("comes")
        stack.callback(end, comes)
        for name, process in (("stays", stays), ("comes", comes)):
            assert process.wait(timeout=PATIENCE_SECONDS) == 0, (tmp_path / name).read_text()
    record = json.loads(video.with_suffix(".json").read_text())
    assert (record["parallel"]["ranks"], record["resumed_at"] > 0) == (2, True)
    expected = latents_of(whole)
    assert float(torch.linalg.norm(latents_of(video) - expected) / torch.linalg.norm(expected)) <= 1e-5


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def listens(endpoint: str) -> bool:
    host, port = endpoint.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def wait_until(what: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not what():
        assert time.monotonic() < until, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
