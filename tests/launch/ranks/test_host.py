"""A rank as a process: lines in, events out, `exit` last, and killed with its host."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.files.processes import start_time
from launch.process.environment import rank_environment, without_place
from launch.ranks.host import Event, RankHost, end_ranks
from launch.ranks.local import LocalRanks
from launch.ranks.ray_pool import RayRanks, Start

# A rank that imports nothing slow: says what it finds, echoes lines, and does as it is told.
RANK = """
import json, os, sys
tell = os.fdopen(int(os.environ["FREESPEC_EVENTS"]), "w", buffering=1)
tell.write(json.dumps({"event": "ready", "rank": os.environ.get("RANK"), "pid": os.getpid()}) + "\\n")
print("to the log", file=sys.stderr, flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        os.write(int(os.environ["FREESPEC_LAST_LINE"]), b"error: a mistake")
        sys.exit(2)
    tell.write(json.dumps({"event": "echo", "line": line.strip()}) + "\\n")
"""


def until(host: RankHost, name: str) -> Event:
    """The first event of that name; what the rank prints comes as events in between."""
    seen: list[Event] = []
    deadline = time.monotonic() + 200
    while not (found := [event for event in seen if event["event"] == name]):
        assert time.monotonic() < deadline, seen
        seen += host.poll(1.0)
    return found[0]


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_ends_with_its_stdin_or_is_killed_after_a_time() -> None:
    for rest, code in (("", 0), ("time.sleep(300)", -signal.SIGKILL)):
        host = RankHost()
        host.start(["-c", f"import sys, time\nsys.stdin.read()\n{rest}"], {})
        assert host.is_running
        host.finish(60.0 if code == 0 else 0.2)
        assert until(host, "exit")["code"] == code


def test_lines_events_and_the_end(tmp_path: Path) -> None:
    host = RankHost()
    host.start(["-c", RANK], {"RANK": "1"}, log=str(tmp_path / "a.log"))
    ready = until(host, "ready")
    assert ready["rank"] == "1"
    host.send("hello")
    assert until(host, "echo")["line"] == "hello"
    host.send("end")
    end = until(host, "exit")
    assert (end["code"], end["said"], end["tail"]) == (2, "error: a mistake", ["to the log"])
    assert end["pid"] == ready["pid"]
    host.send("nobody hears this")
    assert host.drain() == []


def test_kill_is_reported_and_output_can_be_events() -> None:
    host = RankHost()
    host.start(["-c", RANK], {})
    until(host, "stderr")
    host.kill()
    assert until(host, "exit")["code"] == -signal.SIGKILL


def test_ranks_have_ended_when_end_ranks_returns() -> None:
    """At once, without a wait of this test: whoever starts the next command finds their memory free."""
    ranks = [LocalRanks(2, environment={}, command=["-c", RANK]) for _ in range(2)]
    for each in ranks[:1]:  # the other replica was never started
        each.start(None)
    assert [each.num_running for each in ranks] == [2, 0]
    pids = [host._process.pid for host in ranks[0]._hosts]
    end_ranks(ranks)
    assert [gone(pid) for pid in pids] == [True, True]
    assert [each.num_running for each in ranks] == [0, 0]


class Stubborn:
    """Three ranks, of which one has ended by itself, one ends when it was killed twice, and one never does."""

    count = 3
    kills = 0

    @property
    def num_running(self) -> int:
        return 2 if self.kills < 2 else 1

    def kill(self) -> None:
        self.kills += 1

    def drain(self) -> list[object]:
        return []


def test_ranks_that_do_not_end_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.ranks.host.END_SECONDS", 0.25)
    end_ranks([Stubborn()])
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 of 2 ranks were not seen to end within 0.25 s after they were killed, and ")
    assert said.count("\n") == 1


class Pool:
    """A pool whose bridge takes orders and does nothing."""

    is_open = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.orders: list[str] = []

    def order(self, do: str, **_: object) -> None:
        self.orders.append(do)

    def pump(self) -> None:
        """Nothing comes."""


def ranks_in(pool: Pool, *events: dict[str, object]) -> RayRanks:
    """Two ranks on Ray, of which rank 0 has ended by itself, and what rank 1 has sent."""
    start = Start(gpus=False, strategy="PACK", command=(), environment={}, logs=None, cwd="/")
    ranks = RayRanks(pool, "ranks", 2, start)
    ranks.start(None)
    for rank, of in [(0, {"event": "placed"}), (0, {"event": "exit"}), *((1, event) for event in events)]:
        ranks.receive({"generation": 1, "rank": rank, "of": of})
    return ranks


LOST = {"event": "exit", "code": None, "lost": True}


def test_a_lost_rank_on_ray_counts_until_its_end_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its exit is reported at once, for another replica to make its item; the end of the command waits for its process."""
    monkeypatch.setattr("launch.ranks.host.END_SECONDS", 0.05)
    ranks = ranks_in(Pool("auto"), LOST)
    assert [rank for rank, event in ranks.drain() if event["event"] == "exit"] == [0, 1]
    ranks.start(None)  # a replica that was started anew still has a former rank that nobody saw end
    assert ranks.num_running == 3
    for rank in range(2):
        ranks.receive({"generation": 2, "rank": rank, "of": {"event": "exit"}})
    end_ranks([ranks])
    assert capsys.readouterr().err.startswith("warning: 1 of 1 ranks were not seen to end within 0.05 s after ")
    ranks.receive({"generation": 1, "rank": 1, "of": {"event": "ended"}})
    end_ranks([ranks])
    assert (ranks.num_running, capsys.readouterr().err) == (0, "")
    assert ranks_in(Pool("auto"), LOST | {"lost": False}).num_running == 0  # never started
    monkeypatch.setattr("launch.ranks.ray_pool.LOST_SECONDS", 0.0)  # its actor has killed it, unpolled
    assert ranks_in(Pool("auto"), LOST).num_running == 0


def test_ranks_of_a_bridge_that_is_lost_are_looked_for_here_alone() -> None:
    """A local Ray's ranks are processes of this machine; those of a cluster are waited for."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = {"event": "started", "process": [process.pid, start_time(process.pid)]}
        local, cluster = (ranks_in(Pool(address), started) for address in ("local", "auto"))
        for ranks in (local, cluster):
            ranks.lose("lost Ray")
            ranks.start(None)
            assert ranks.num_running == 3  # with those of the next start
        process.kill()
    for ranks in (local, cluster):
        ranks.lose("lost Ray")
    assert (local.num_running, cluster.num_running) == (0, 1)
    waiting = RayRanks(
        Pool("auto"), "ranks", 2, Start(gpus=True, strategy="PACK", command=(), environment={}, logs=None, cwd="/")
    )
    waiting.start(None)
    waiting.lose("lost Ray")
    assert waiting.num_running == 0  # they had no place yet


def test_ctrl_c_ends_the_wait_for_ranks_alone() -> None:
    class Interrupted(Stubborn):
        @property
        def num_running(self) -> int:
            if self.kills > 3:
                raise KeyboardInterrupt
            return 1

    ranks = Interrupted()
    end_ranks([ranks])
    assert ranks.kills == 4


def test_unpolled_rank_is_killed() -> None:
    host = RankHost()
    host.start(["-c", RANK], {})
    pid = until(host, "ready")["pid"]
    host.die_unless_polled(0.2)
    wait_for(lambda: gone(pid))


def test_a_rank_does_not_outlive_its_host() -> None:
    """The host's process is killed; the kernel ends the rank, as it asked for when it started."""
    code = (
        "import sys, time; from launch.ranks.host import RankHost\n"
        "host = RankHost(); host.start(['-c', sys.argv[1]], {}, log='/dev/null'); print(host.poll(60)[0]['pid'], flush=True)\n"
        "time.sleep(600)"
    )
    rank = "from launch.process.stopping import die_with_parent; die_with_parent()\n" + RANK
    process = subprocess.Popen([sys.executable, "-c", code, rank], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.kill()
    process.communicate()
    wait_for(lambda: gone(pid))


def test_rank_meets_only_its_replica() -> None:
    found = rank_environment(1, 2, local_rank=0, local_size=2, address="127.0.0.1", port=5)
    numbers = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert found.items() >= (numbers | {"MASTER_PORT": "5"}).items()
    assert without_place({"RANK": "0", "TORCHELASTIC_RUN_ID": "x", "HOME": "/"}) == {"HOME": "/"}
