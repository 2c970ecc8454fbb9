"""generate.py on several ranks: every way to start them makes one rank's video, and every mistake is one line for all."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.files.latents import load_latents
from engine.media.read_video import count_frames
from launch.arguments.prompts import EXAMPLE
from launch.cli.start import run_here
from launch.process.argv import requested_ranks
from launch.process.environment import LAUNCHER
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import Ended, run_forked
from tests.launch.test_generate import names
from tests.tiny_pipelines import random_wan

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "launch/generate.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# 9 x 5 tiles of 16 pixels, with some overlap; small frames are not tiled otherwise.
TILED = {"decode.mode": "tiled"} | {f"decode.tile_{side}": 16 for side in ("height", "width")}
TILED |= {f"decode.stride_{side}": 12 for side in ("height", "width")}


def words(folder: Path, output: Path, settings: dict[str, object] | None = None) -> list[str]:
    """The command line of a small video and its latents, which are kept."""
    chosen = {"model.path": folder, "output.path": output, "output.save_latents": output.with_suffix(".safetensors")}
    return [f"--{key}={value}" for key, value in (chosen | SMALL | (settings or {})).items()]


def prompted(*arguments: object) -> list[str]:
    return [*words(*arguments), "--prompt=a red circle"]


def latents_of(path: Path) -> torch.Tensor:
    return load_latents(path.with_suffix(".safetensors"))[0]


def assert_same(path: Path, expected: torch.Tensor) -> None:
    """Within the tolerance of a whole run over ranks."""
    latents = latents_of(path)
    error = float(torch.linalg.norm(latents - expected) / torch.linalg.norm(expected))
    assert error <= 1e-5, error


def one_line(ended: Sequence[Ended], code: int = 2) -> str:
    """What follows `error: ` on rank 0's stderr: one line from all ranks together, and one exit code."""
    assert [rank.code for rank in ended] == [code] * len(ended), ended
    assert [rank.out for rank in ended] == [""] * len(ended), ended
    assert [rank.err for rank in ended[1:]] == [""] * (len(ended) - 1), ended
    assert ended[0].err.startswith("error: "), ended
    assert ended[0].err.count("\n") == 1, ended
    return ended[0].err.removeprefix("error: ").strip()


@pytest.fixture(scope="module")
def alone(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The latents of one process."""
    target = tmp_path_factory.mktemp("alone") / "a.mp4"
    run_here("generate", prompted(wan_folder, target))
    return latents_of(target)


def test_three_ranks_make_the_videos_of_one(make: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> None:
    """Two prompts, uneven shares, tiles over the ranks, traces, and what the record and the terminal say of it."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    more = ["--prompts", tmp_path / "prompts.txt", "--output.trace", "--verbose"]
    one, three = (words(wan_folder, tmp_path / name / "a.mp4", TILED) for name in ("one", "three"))
    run_here("generate", [*one, *map(str, more)])
    ended = run_forked([[*three, *more, "--parallel.ring=3"]] * 3, tmp_path)
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    assert names(tmp_path / "three") == names(tmp_path / "one")
    for index in range(2):
        stem = f"a-00{index}.mp4"
        assert_same(tmp_path / "three" / stem, latents_of(tmp_path / "one" / stem))
        assert count_frames(tmp_path / "three" / stem) == 17
    record = json.loads((tmp_path / "three/a-001.json").read_text())
    layout = record["parallel"]
    assert {name: layout[name] for name in ("ranks", "cfg", "ring", "ulysses")} == {
        "ranks": 3,
        "cfg": 1,
        "ring": 3,
        "ulysses": 1,
    }
    assert layout["why"] == "the only arrangement that the configuration allows"
    assert layout["nodes"] == [{"node": socket.gethostname(), "ranks": [0, 1, 2]}]
    assert record["decode"]["mode"] == "tiled"
    assert sum(record["decode"]["tiles_by_rank"]) == record["decode"]["tiles"] == 9

    assert [rank.out.count("\n") for rank in ended] == [2, 0, 0]
    assert [rank.err for rank in ended] == [
        f"[rank {rank}] of 3 ranks, on cpu: cfg 0 of 1, ring {rank} of 3, ulysses 0 of 1; "
        f"tokens {tokens} of 80, in attention heads 0 to 4 of 4\n"
        for rank, tokens in enumerate(("0 to 24", "24 to 48", "48 to 80"))
    ]


def test_the_preset_of_the_embedded_ltx_video_on_one_rank_and_four(tmp_path: Path) -> None:
    """Four times the native length through the whole command, in two steps."""
    command = [f"--config={ROOT / 'configs/tiny-ltx.yaml'}", "--prompt=a red circle", "--sampler.num_steps=2"]
    command += ["--model.device=cpu", "--output.progress=off"]
    targets = {ranks: tmp_path / f"{ranks}/a.mp4" for ranks in (1, 4)}
    for ranks, target in targets.items():
        target.parent.mkdir()
        files = [f"--output.path={target}", f"--output.save_latents={target.with_suffix('.safetensors')}"]
        ended = run_forked([[*command, *files]] * ranks, target.parent)
        assert [rank.code for rank in ended] == [0] * ranks, ended
        assert count_frames(target) == 129
    assert_same(targets[4], latents_of(targets[1]))


def test_without_a_prompt_or_a_preset_the_embedded_model_makes_its_example(tmp_path: Path) -> None:
    """As `torchrun launch/generate.py --nproc 8` does, which is tried with one frame more than native and one step."""
    small = ["--video.num_frames=37", "--sampler.num_steps=1", "--model.device=cpu"]
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--nproc=2", *small],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    said, note, summary = ended.stdout.splitlines()
    assert note.startswith("note: with freespec the only step"), note
    assert said == f'no --prompt and no --config: the embedded model makes its example, "{EXAMPLE}"'
    assert summary.startswith("runs/video.mp4: 37 frames")
    record = json.loads((tmp_path / "runs/video.json").read_text())
    assert (record["prompt"], record["parallel"]["ranks"]) == (EXAMPLE, 2)
    assert record["config"]["model"]["path"] == "tiny/wan"


@pytest.mark.parametrize("chosen", [["--config", "tiny-ltx"], ["--model.path", "tiny/ltx"], ["--model", "tiny/ltx"]])
def test_another_model_has_no_example(run: Callable[..., Run], chosen: list[str]) -> None:
    assert run("generate", *chosen).error == "give one of --prompt TEXT, --timeline EVENTS and --prompts FILE"


def started_by_torchrun_of_two_machines(command: list[str]) -> list[list[str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    return [[*TORCHRUN, *nodes, f"--node-rank={rank}", str(SCRIPT), *command] for rank in range(2)]


BARE = "torchrun generate.py --nproc"
STARTS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "generate.py --nproc": lambda command: [[sys.executable, str(SCRIPT), "--nproc=2", *command]],
    BARE: lambda command: [[*TORCHRUN, str(SCRIPT), "--nproc", "2", *command]],
    "torchrun -- generate.py --nproc": lambda command: [[*TORCHRUN, "--", str(SCRIPT), "--nproc", "2", *command]],
    "torchrun --nproc-per-node generate.py": lambda command: [
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(SCRIPT), *command]
    ],
    "two agents of torchrun": started_by_torchrun_of_two_machines,
}


# Older ones take `--nproc` for an abbreviation of two of torchrun's own options.
READS_NPROC = (3, 12, 8) <= sys.version_info[:3] < (3, 13) or sys.version_info[:3] >= (3, 13, 1)


@pytest.mark.parametrize(
    "start",
    [
        "two agents of torchrun",
        pytest.param(
            BARE, marks=pytest.mark.skipif(not READS_NPROC, reason="its argparse takes no --nproc after a script")
        ),
        # That of generate.py alone is seen above, without its latents.
        pytest.param("generate.py --nproc", marks=pytest.mark.slow),
        *(pytest.param(start, marks=pytest.mark.slow) for start in STARTS if start.startswith("torchrun -")),
    ],
)
def test_ranks_start(start: str, wan_folder: Path, alone: torch.Tensor, tmp_path: Path) -> None:
    """As a person types it; without a configuration it is the preset of the embedded model."""
    processes = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in STARTS[start](prompted(wan_folder, tmp_path / "a.mp4"))
    ]
    shown = [process.communicate(timeout=250) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), shown
    assert_same(tmp_path / "a.mp4", alone)
    assert sum(out.count("\n") for out, _ in shown) == 1, shown
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["config"]["sampler"]["guidance_scale"] == 5.0
    assert record["parallel"]["ranks"] == 2
    assert names(tmp_path) == {"a.mp4", "a.json", "a.png", "a.safetensors"}


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"vidoe.fps": 3}, "unknown setting vidoe.fps; did you mean video.fps?"),
        ({"model.path": "no/folder/here"}, "model.path 'no/folder/here'"),
        ({"parallel.ring": 3}, "2 ranks cannot be arranged with ring 3; possible are 1 x 2 x 1, "),
        (
            {"parallel.cfg": 2, "sampler.guidance_scale": 1.0},
            "parallel.cfg is 2, but sampler.guidance_scale 1.0 runs one pass",
        ),
        (
            {"parallel.provider": "deepspeed", "parallel.ulysses": 2, "video.height": 8, "video.width": 8},
            "parallel.provider deepspeed: ",
        ),
        (
            {"parallel.provider": "xfuser", "method.name": "direct"},
            "parallel.provider xfuser: xfuser runs on CUDA only",
        ),
        (
            {"parallel.provider": "xfuser"},
            "parallel.provider xfuser computes full attention only: use it with method.name",
        ),
        ({"decode.tile_height": 30, "decode.stride_height": 8}, "decode.tile_height must be a multiple of"),
    ],
)
def test_a_mistake_on_all_ranks_is_one_line(
    mistake: dict[str, object], said: str, wan_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "a.mp4"
    assert one_line(run_forked([prompted(wan_folder, target, mistake)] * 2, tmp_path)).startswith(said)
    assert names(tmp_path / "out") == set()


def test_an_existing_output_ends_all_ranks(wan_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("mine")
    assert "exists already" in one_line(run_forked([prompted(wan_folder, tmp_path / "a.mp4")] * 2, tmp_path))
    assert (tmp_path / "a.mp4").read_text() == "mine"


def test_ranks_that_want_different_things_all_say_so(wan_folder: Path, tmp_path: Path) -> None:
    command = prompted(wan_folder, tmp_path / "a.mp4")
    for name, other in (
        ("seed", [*command, "--sampler.seed=1"]),
        ("settings", [*command, "--method.window_frames=2"]),
        ("prompt", [*command, "--prompt=a blue star"]),
        ("model.path", [*command, f"--model.path={wan_folder / '.'}/"]),
    ):
        said = one_line(run_forked([command, other], tmp_path))
        assert said == f"rank 1 has another {name} than rank 0; start all ranks with the same command and files"


@dataclasses.dataclass(frozen=True)
class OnOtherMachine:
    """Rank 1 has another working directory, where the same name means something else."""

    folder: Path

    def __call__(self, rank: int) -> None:
        os.chdir(self.folder if rank == 1 else self.folder.parent)


def test_another_checkpoint_under_the_same_name(wan_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "machine"
    shutil.copytree(wan_folder, tmp_path / "wan")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    command = prompted("wan", tmp_path / "a.mp4")

    random_wan(heads=2).save_pretrained(other / "wan", safe_serialization=True)
    said = one_line(run_forked([command] * 2, tmp_path, fault=OnOtherMachine(other)))
    assert said.startswith("rank 1 has another checkpoint")

    random_wan(seed=1).save_pretrained(other / "wan", safe_serialization=True)
    said = one_line(run_forked([command] * 2, tmp_path, fault=OnOtherMachine(other)))
    assert said.startswith("rank 1 has another checkpoint than rank 0")

    shutil.copy(wan_folder / weights, other / "wan" / weights)
    (other / "wan" / "vae/diffusion_pytorch_model.safetensors").unlink()
    said = one_line(run_forked([command] * 2, tmp_path, fault=OnOtherMachine(other)))
    assert said.startswith("rank 1 ")

    shutil.rmtree(other / "wan")
    said = one_line(run_forked([command] * 2, tmp_path, fault=OnOtherMachine(other)))
    assert said.startswith("rank 1: model.path 'wan'")


def test_a_process_alone_refuses_what_is_for_ranks(make: Callable[..., Run]) -> None:
    assert make({"parallel.ulysses": 2, "parallel.cfg": 2}).error == (
        "parallel asks for 4 ranks, but this is one process; add --nproc 4"
    )
    assert "parallel.provider deepspeed is for ranks" in make({"parallel.provider": "deepspeed"}).error
    assert make(None, "--nproc", 0).error == "--nproc must be 1 or more, got 0"
    assert make(None, "--nproc", "many").error == "--nproc must be a whole number, got 'many'"


def test_nproc_beside_the_ranks_of_torchrun(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = make(None, "--nproc", 4).error
    assert said == "torchrun has started 2 ranks, and --nproc 4 would start more on each; use one of them"


def test_ranks_without_an_address(make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not MASTER_ADDR and MASTER_PORT" in make().error
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "many")
    assert make().error == "MASTER_PORT must be the number of a port, 1 to 65535, got 'many'"
    monkeypatch.setenv("MASTER_PORT", "99999")
    assert make().error == "MASTER_PORT must be the number of a port, 1 to 65535, got '99999'"


@pytest.mark.parametrize(
    ("argv", "environment", "expected"),
    [
        (["--nproc", "8"], {}, 8),
        (["--nproc=2", "--prompt", "x", "--nproc", "3"], {}, 3),
        (["--prompt", "x"], {}, None),
        (["--nproc", "8", "--help"], {}, None),
        (["--nproc"], {}, None),
        (["--nproc", "-1"], {}, None),
        (
            ["--nproc", "8"],
            {"RANK": "0", "WORLD_SIZE": "1"},
            8,
        ),  # the one process of `torchrun -- generate.py --nproc 8`
        (["--nproc", "8"], {"RANK": "0", "WORLD_SIZE": "2"}, None),
        (["--nproc", "8"], {"RANK": "0", "WORLD_SIZE": "8", LAUNCHER: "1"}, None),
    ],
)
def test_how_many_ranks_are_asked_for(
    argv: list[str], environment: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    assert requested_ranks(argv) == expected
