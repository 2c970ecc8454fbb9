"""Ray clusters of more than one node, and jobs that are handed in: a node is lost, and the rest makes everything."""

import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.batch.files import BatchFiles
from launch.process.environment import PlacementStrategy, carried
from launch.ranks.ray_pool import RayPool, Start
from tests.launch.conftest import Run
from tests.launch.test_batch import assert_whole, events_of, made_in_a_loop, words
from tests.launch.test_ranks import SCRIPT, prompted

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


# Ray and its processes take their time on a machine with other work.
PATIENCE_SECONDS = 600.0
ROOT = Path(__file__).resolve().parents[3]

# Node processes of one machine, on loopback, each with a slot for one rank; the first has none. A line on stdin takes
# the last away: its raylet is killed, and whatever ran there.
NODES = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
cluster.wait_for_nodes()
print("at", cluster.address, *(node.node_id for node in nodes), flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("lost", flush=True)
cluster.shutdown()
"""

# Four nodes of two to three slots, on loopback.
UNEVEN = """
import sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **small})
for slots in (3, 2, 3):
    cluster.add_node(num_cpus=slots, **small)
cluster.wait_for_nodes()
print("at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""

# A cluster without a GPU, of which an autoscaler says that there may be two; a line on stdin brings a node with one.
GROWING = """
import sys
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small})
group = autoscaler_pb2.NodeGroupConfig(name="gpus", resources={"CPU": 1, "GPU": 1}, max_count=2)
config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
client = ray._raylet.GcsClient(address=cluster.address)
client.internal_kv_put(
    ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), config.SerializeToString(), True,
    ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
)
print("at", cluster.address, flush=True)
for line in sys.stdin:
    cluster.add_node(num_cpus=1, num_gpus=1, **small)
    print("grown", flush=True)
cluster.shutdown()
"""

# Says where the rank is. Imports nothing slow.
WHERE = """
import os
assert (os.environ.get("NCCL_DEBUG"), os.environ.get("HF_TOKEN")) == ("WARN", None)
names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "FREESPEC_NODE")
print(*(os.environ[name] for name in names), flush=True)
"""

# One node with the dashboard, which takes jobs.
JOBS = """
import sys
import ray
context = ray.init("local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0,
                   object_store_memory=100 * 2**20, logging_level="error")
print("at", f"http://{context.dashboard_url}", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster started by another process, and its first output."""

    process: subprocess.Popen[str]
    said: list[str]

    @classmethod
    def start(cls, script: str) -> "Cluster":
        """In this process's environment, which says loopback and the token."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, "-c", script], **pipes, text=True)
        found = next((line.split()[1:] for line in process.stdout if line.startswith("at ")), None)
        assert found is not None, process.wait()
        return cls(process, found)

    def lose_a_node(self) -> None:
        """SIGKILL to its Ray node process, and to what ran there."""
        self.process.stdin.write("lose\n")
        self.process.stdin.flush()
        assert next(iter(self.process.stdout)) == "lost\n"

    def stop(self) -> None:
        """All of it, and wait."""
        self.process.communicate("", timeout=PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def as_a_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread per rank, loopback, and a token of this test's own, for the cluster and for those who connect to it."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    given = {"OMP_NUM_THREADS": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in (given | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def start() -> Iterator[Callable[[str], Cluster]]:
    """`start(script)`: a cluster that is stopped after the test."""
    started: list[Cluster] = []

    def call(script: str) -> Cluster:
        started.append(Cluster.start(script))
        return started[-1]

    yield call
    for cluster in started:
        cluster.stop()


def test_a_node_is_lost_and_the_others_make_everything(
    start: Callable[[str], Cluster], wan_folder: Path, tmp_path: Path
) -> None:
    """Two nodes with a replica each; one is killed while it makes an item, and there is no place for its replica then."""
    longer = {"sampler.num_steps": 200}  # seconds an item, so that it is not done before the node is gone
    cluster, out = start(NODES), tmp_path / "out"
    suite = tmp_path / "prompts.txt"
    suite.write_text("a red circle\na blue star\n")
    settings = {"ray": cluster.said[0], "replicas": 2, "keep_latents": True}
    command = [sys.executable, "-m", "launch.batch", *words(wan_folder, suite, out, settings | longer)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    until = time.monotonic() + PATIENCE_SECONDS
    while len(list(out.glob("*/*/unfinished/*.snapshot.safetensors"))) < 1 or len(events_of(out, "ready")) < 2:
        assert time.monotonic() < until
        assert driver.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    cluster.lose_a_node()
    assert driver.wait(timeout=PATIENCE_SECONDS) == 0, (tmp_path / "log").read_text()
    assert_whole(out, made_in_a_loop(wan_folder, **longer))
    lost = [event for event in [*events_of(out, "failed"), *events_of(out, "ended")] if event["kind"] == "lost"]
    assert len({event["replica"] for event in lost}) >= 1, (tmp_path / "log").read_text()
    assert list(BatchFiles(root=out).quarantine.glob("*")) == []


def test_auto_is_the_cluster_of_the_environment(
    run: Callable[..., Run],
    start: Callable[[str], Cluster],
    wan_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A replica of two ranks on two nodes that have a slot each: its ranks meet on the address of the first."""
    monkeypatch.setenv("RAY_ADDRESS", start(NODES).said[0])
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    settings = {"ray": "auto", "nproc": 2, "methods": "direct"}
    shown = run("batch", *words(wan_folder, tmp_path / "prompts.txt", tmp_path / "out", settings))
    assert (shown.code, shown.err) == (0, ""), shown
    assert "1 of 1 items done (1 now), 0 in quarantine" in shown.out


def print_places(address: str, count: int, strategy: PlacementStrategy) -> list[tuple[int, int, int, str]]:
    """Rank, LOCAL_RANK, LOCAL_WORLD_SIZE and node, as each of `count` real ranks finds them, in rank order."""
    printed = dict.fromkeys(range(count), "")
    with RayPool(address, cpus=count, log=None) as pool:
        start = Start(
            gpus=False,
            strategy=strategy,
            command=["-c", WHERE],
            environment=carried(os.environ),
            logs=None,
            cwd=str(ROOT),
        )
        ranks = pool.ranks("ranks", count, start)
        ranks.start(None)
        until, ended, placing = time.monotonic() + PATIENCE_SECONDS, set(), []
        while len(ended) < count:
            assert time.monotonic() < until, printed
            for rank, event in ranks.drain():
                printed[rank] += event["text"] if event["event"] == "stdout" else ""
                ended |= {rank} if event["event"] == "exit" else set()
                placing += [event["event"]] if rank == 0 else []
            time.sleep(0.05)
    assert placing[:2] == ["placing", "placed"]
    found = [printed[rank].split() for rank in range(count)]
    return [(int(rank), int(local), int(size), node) for rank, local, size, node in found]


def test_ranks_are_numbered_by_node(start: Callable[[str], Cluster], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine real ranks on four uneven nodes, dealt out by turns: neighbours share a node, and each knows its number there.

    Variables that are set after the cluster was started reach them, and a secret does not.
    """
    cluster = start(UNEVEN)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = print_places(cluster.said[0], 9, "SPREAD")
    assert [rank for rank, *_ in found] == [*range(9)]
    nodes = [node for *_, node in found]
    runs = [(node, len(list(run))) for node, run in itertools.groupby(nodes)]
    assert len(runs) == len(set(nodes)) == 4, found
    assert max(size for _, size in runs) <= 3
    at = 0
    for _, size in runs:
        assert [place[1:3] for place in found[at : at + size]] == [(local, size) for local in range(size)], found
        at += size


def test_a_placement_strategy_is_followed_and_the_record_names_every_node(
    run: Callable[..., Run], start: Callable[[str], Cluster], wan_folder: Path, tmp_path: Path
) -> None:
    """One node, two nodes: for one video and for the replicas of a batch."""
    address = start(UNEVEN).said[0]
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    for strategy, sizes in (("STRICT_PACK", [2]), ("STRICT_SPREAD", [1, 1])):
        given = {"ray": address, "nproc": 2, "methods": "direct", "placement_strategy": strategy}
        out, video = tmp_path / strategy, tmp_path / f"{strategy}.mp4"
        shown = run("batch", *words(wan_folder, tmp_path / "prompts.txt", out, given))
        assert (shown.code, shown.err) == (0, ""), shown
        sidecar = next(out.glob("direct/*/videos/*.json"))
        command = [*prompted(wan_folder, video), "--nproc=2", f"--ray={address}", f"--placement_strategy={strategy}"]
        ended = subprocess.run([sys.executable, str(SCRIPT), *command], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, ""), ended
        records = json.loads(sidecar.read_text())["run"], json.loads(video.with_suffix(".json").read_text())
        for record in records:
            nodes = record["parallel"]["nodes"]
            assert [len(node["ranks"]) for node in nodes] == sizes, nodes
            assert len({node["node"] for node in nodes}) == len(sizes)


def command_of(folder: Path, video: Path, address: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *prompted(folder, video), f"--ray={address}"]


def test_gpus_that_an_autoscaler_may_bring_are_waited_for(
    run: Callable[..., Run], start: Callable[[str], Cluster], wan_folder: Path, tmp_path: Path
) -> None:
    """One video waits for its GPU in place of a CPU that is free; a batch, or a video for three GPUs, is one line."""
    cluster, video = start(GROWING), tmp_path / "a.mp4"
    address = cluster.said[0]
    process = subprocess.Popen(command_of(wan_folder, video, address), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("waits for 1 x {'CPU': 1, 'GPU': 1} (PACK); the cluster has {'CPU': 1"), line
    assert "'GPU': 0} in all" in line
    with subprocess.Popen(
        command_of(wan_folder, tmp_path / "c.mp4", address), stderr=subprocess.PIPE, text=True
    ) as other:
        assert other.stderr.readline().startswith("waits for ")
        other.send_signal(signal.SIGINT)
        _, said = other.communicate(timeout=PATIENCE_SECONDS)  # no rank has anything to keep
    assert (other.returncode, said) == (130, "stopped while waiting for its place on the cluster\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = words(wan_folder, tmp_path / "prompts.txt", tmp_path / "out", {"ray": address})
    assert " may bring GPUs, and this batch would run on CPUs; give --gpus_per_replica N" in run("batch", *given).err
    wide = [*command_of(wan_folder, tmp_path / "b.mp4", address), "--nproc=3"]
    refused = subprocess.run(wide, capture_output=True, text=True, check=False)
    assert refused.stderr.startswith("error: 3 ranks need 3 GPUs, and the cluster has 2; give --nproc 2"), refused
    assert (process.poll(), video.exists()) == (None, False)
    cluster.process.stdin.write("grow\n")
    cluster.process.stdin.flush()
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, rest, video.exists()) == (0, "", True)


def test_a_job_that_is_handed_in(start: Callable[[str], Cluster], wan_folder: Path, tmp_path: Path) -> None:
    """`ray job submit -- python launch/batch.py --ray auto`: the job's own cluster makes it, and its line is the job's."""
    pytest.importorskip("aiohttp", reason="a job needs Ray's dashboard, which comes with ray[default]")
    address, out = start(JOBS).said[0], tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    given = words(wan_folder, tmp_path / "prompts.txt", out, {"ray": "auto", "methods": "direct"})
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--"]
    script = [sys.executable, str(ROOT / "launch/batch.py")]
    ended = subprocess.run(
        [*submit, *script, *given],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        env=dict(os.environ),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 of 1 items done (1 now), 0 in quarantine" in ended.stdout
    assert len(list(out.glob("direct/*/videos/*.mp4"))) == 1
    again = subprocess.run(
        [*submit, *script, *given, "--sampler.num_steps=7"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert again.returncode != 0
    assert "changed: sampler.num_steps 6 -> 7" in again.stdout
