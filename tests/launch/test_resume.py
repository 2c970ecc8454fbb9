"""The same command goes on from whatever it has left, says so when all is made, and never replaces what is not its own."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import produce
from engine.decode.decoder import VideoDecoder
from engine.denoise.loop import DenoiseLoop
from engine.engine import LongVideoEngine
from engine.files.checks import snapshot_bytes
from engine.files.claims import claim
from engine.files.latents import load_latents
from engine.files.tensors import read_metadata
from engine.files.whole import WriteError
from launch.cli.start import run_here
from launch.commands import decode
from launch.video import make as make_video
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import run_forked
from tests.launch.test_generate import names
from tests.launch.test_interruptions import interrupted_at_forward

Make = Callable[..., Run]
MADE = {"a.mp4", "a.png", "a.json"}


def content(folder: Path) -> dict[str, bytes]:
    """Of the files that the same run makes with the same bytes, which a record, with its times, is not."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".mp4", ".png", ".csv")}


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on a model that is loaded is a failure."""
    return lambda: monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("it was loaded"))


@pytest.fixture
def words(wan_folder: Path) -> Callable[..., list[str]]:
    """`words(folder, {setting: value})`: the command line of a small run for another process."""

    def call(folder: Path, settings: dict[str, object] | None = None) -> list[str]:
        chosen = {"model.path": wan_folder, "output.path": folder / "a.mp4", "prompt": "a red circle"}
        chosen |= SMALL | (settings or {})
        if "prompts" in chosen:
            del chosen["prompt"]
        return [f"--{key}={value}" for key, value in chosen.items()]

    return call


def test_a_finished_run_says_so_and_makes_nothing(make: Make, no_loading: Callable[[], None], tmp_path: Path) -> None:
    assert make().code == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    no_loading()
    shown = make()
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == f"{tmp_path / 'a.mp4'}: finished already, 17 frames; --output.overwrite makes it again\n"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before
    # What does not decide the video may differ; what only another run would make is said.
    shown = make({"output.save_latents": tmp_path / "z.safetensors", "output.trace": "true", "output.progress": "off"})
    assert "; its latents were not kept; it was made without a trace; " in shown.out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampler.seed": 1}, "sampler.seed was 0, now 1"),
        (
            {"sampler.num_steps": 3, "video.num_frames": 21},
            "sampler.num_steps was 4, now 3; video.num_frames was 17, now 21",
        ),
        ({"method.freespec.alpha": 2.0}, "method.freespec.alpha was 5.0, now 2.0"),
        ({"output.crf": 20}, "output.crf was 12, now 20"),
        ({"decode.mode": "tiled"}, "decode.mode was 'auto', now 'tiled'"),
        ({"video.fps": 8}, "video.fps was 16, now 8"),
        ({"prompt": "a blue star"}, "prompt was 'a red circle', now 'a blue star'"),
    ],
)
def test_files_of_other_settings_are_refused_with_what_differs(
    make: Make, tmp_path: Path, finished: Path, settings: dict[str, object], words: str
) -> None:
    prompt = ["--prompt", settings.pop("prompt")] if "prompt" in settings else []
    error = make({"output.path": finished} | settings, *prompt).error
    assert error.startswith(f"{finished} exists already; choose another name or add --output.overwrite; ")
    assert error.endswith(f"; it was made with other settings: {words}")


@pytest.fixture(scope="module")
def finished(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that a run has finished."""
    path = tmp_path_factory.mktemp("finished") / "a.mp4"
    chosen = {"model.path": wan_folder, "output.path": path, "prompt": "a red circle"} | SMALL
    run_here("generate", [f"--{key}={value}" for key, value in chosen.items()])
    return path


@dataclass(frozen=True)
class KilledAtChange:
    """SIGKILL just before the n-th change of a file in the folder that is no lock; `count` says where to note how many there were."""

    folder: Path
    number: int
    count: Path

    def __call__(self, rank: int) -> None:
        seen = 0

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in ("os.rename", "os.link", "os.remove") or not str(arguments[0]).startswith(str(self.folder)):
                return
            if Path(str(arguments[0])).name.startswith("."):
                return
            seen += 1
            self.count.write_text(str(seen))
            if seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_change_of_its_files_the_same_command_ends_in_the_same_bytes(
    make: Make, words: Callable[..., list[str]], tmp_path: Path, every: int
) -> None:
    """Noise to snapshots, latents, trace, video, sheet and record: nothing is made twice that was kept, and nothing is left over."""
    settings = {"sampler.num_steps": 2, "output.snapshot_every": 1, "output.trace": "true"}
    whole = tmp_path / "whole"
    assert make(settings | {"output.path": whole / "a.mp4"}).code == 0
    expected, number, done_steps = content(whole), 1 - every, []
    while True:
        number += every
        folder, count = tmp_path / f"killed{number}", tmp_path / "count"
        folder.mkdir()
        [ended] = run_forked([words(folder, settings)], tmp_path, fault=KilledAtChange(folder, number, count))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        left = names(folder)
        for path in folder.glob("*.safetensors"):
            read_metadata(path)  # whole, or not there
        shown = make(settings | {"output.path": folder / "a.mp4"})
        assert (shown.code, shown.err) == (0, ""), (number, left, shown)
        assert content(folder) == expected, (number, left)
        assert names(folder) == names(whole), (number, left)
        assert json.loads((folder / "a.json").read_text())["video"]["sha256"]
        assert ("finished already" in shown.out) == ("a.json" in left), (number, left)
        if "a.snapshot.safetensors" in left and "a.latents.safetensors" not in left:
            done_steps.append(json.loads((folder / "a.json").read_text())["resumed_at"])
    assert done_steps if every > 1 else {1, 2} <= {*done_steps}
    assert number > 10


def test_a_killed_run_costs_a_few_steps(make: Make, words: Callable[..., list[str]], tmp_path: Path) -> None:
    """At step 7 of 30, with the state kept every five by default."""
    settings = {"sampler.num_steps": 30}
    [ended] = run_forked([words(tmp_path, settings)], tmp_path, fault=partial(kill_after_step, 7))
    assert ended.code == -signal.SIGKILL
    assert "a.snapshot.safetensors" in names(tmp_path)
    assert "(continued after step 5)" in make(settings).out
    assert make(settings | {"output.path": tmp_path / "b.mp4"}).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def kill_after_step(number: int, rank: int) -> None:
    check = DenoiseLoop.check

    def count(self: DenoiseLoop, latents: torch.Tensor, finished: int, total: int) -> None:
        if finished == number:
            os.kill(os.getpid(), signal.SIGKILL)
        check(self, latents, finished, total)

    DenoiseLoop.check = count


def test_no_state_is_kept_with_snapshot_every_0(make: Make, words: Callable[..., list[str]], tmp_path: Path) -> None:
    settings = {"sampler.num_steps": 30, "output.snapshot_every": 0}
    [ended] = run_forked([words(tmp_path, settings)], tmp_path, fault=partial(kill_after_step, 7))
    assert ended.code == -signal.SIGKILL
    assert "a.snapshot.safetensors" not in names(tmp_path)
    assert "must be 0 (only when stopped) or more, got -1" in make({"output.snapshot_every": -1}).error


def stop_in(monkeypatch: pytest.MonkeyPatch, make: Make, name: str, *arguments: object) -> Run:
    """Run with an interruption just before `launch.video.make` or `engine.produce` calls the function of this name."""
    module = make_video if hasattr(make_video, name) else produce
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        return make(*arguments)


@pytest.mark.parametrize("name", ["write_picture", "describe_video", "write_record"])
def test_stopped_between_video_sheet_and_record(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert stop_in(monkeypatch, make, name).code == 130
    assert {"a.mp4", "a.latents.safetensors"} <= names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LongVideoEngine, "denoise", lambda *_, **__: pytest.fail("denoised again"))
        assert make().code == 0
    assert names(tmp_path) == MADE
    assert make({"output.path": tmp_path / "b.mp4"}).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_latents_go_on_with_another_way_to_decode_and_not_with_another_seed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_in(monkeypatch, make, "decode_to_files").code == 130
    assert names(tmp_path) == {"a.latents.safetensors"}
    error = make({"sampler.seed": 1}).error
    assert error.startswith(f"{tmp_path / 'a.latents.safetensors'} exists already; choose another name or add ")
    assert error.endswith(
        "make the video from it with launch/decode.py; it was made with other settings: sampler.seed was 0, now 1"
    )
    assert make({"decode.mode": "tiled", "output.crf": 20}).code == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["config"]["decode"]["mode"], record["config"]["output"]["crf"]) == ("tiled", 20)


def test_a_trace_is_not_lost_between_latents_and_its_table(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output.trace": "true"}
    assert make(settings | {"output.path": tmp_path / "b.mp4"}).code == 0
    assert stop_in(monkeypatch, make, "write_trace", settings).code == 130
    assert {"a.latents.safetensors", "a.snapshot.safetensors"} <= names(tmp_path)
    (tmp_path / "a.snapshot.safetensors").rename(tmp_path / "a.checkpoint.safetensors")  # as older versions called it
    assert "(continued after step 4)" in make(settings).out
    for kind in ("csv", "png"):
        assert (tmp_path / f"a.trace.{kind}").read_bytes() == (tmp_path / f"b.trace.{kind}").read_bytes()
    assert "a.latents.safetensors" not in names(tmp_path)
    assert not {"a.snapshot.safetensors", "a.checkpoint.safetensors"} & names(tmp_path)


def test_a_file_that_appears_while_a_run_works_is_not_replaced(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VideoDecoder.decode

    def appear(self: VideoDecoder, latents: torch.Tensor, *, seed: int) -> Any:
        yield from whole(self, latents, seed=seed)
        (tmp_path / "a.mp4").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(VideoDecoder, "decode", appear)
        error = make().error
    assert error.startswith(
        f"cannot write {tmp_path / 'a.mp4'}: another file of this name appeared meanwhile; the latents are"
    )
    assert (tmp_path / "a.mp4").read_text() == "mine"
    assert names(tmp_path) == {"a.mp4", "a.latents.safetensors"}
    with monkeypatch.context() as patch:  # the same of the latents: their steps are kept
        patch.setattr(LongVideoEngine, "denoise", denoise_and(tmp_path / "b.latents.safetensors"))
        error = make({"output.path": tmp_path / "b.mp4"}).error
    assert "b.latents.safetensors: another file of this name appeared meanwhile; after step 4, which is kept" in error
    assert (tmp_path / "b.latents.safetensors").read_text() == "mine"


def denoise_and(appearing: Path) -> Callable[..., Any]:
    denoise = LongVideoEngine.denoise

    def call(self: LongVideoEngine, *args: Any, **kwargs: Any) -> Any:
        denoised = denoise(self, *args, **kwargs)
        appearing.write_text("mine")
        return denoised

    return call


def test_with_overwrite_all_is_made_again_and_goes_on_where_that_was_stopped(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"output.save_latents": tmp_path / "z.safetensors"}
    assert make(settings | {"sampler.seed": 1}).code == 0
    again = settings | {"output.overwrite": "true"}
    assert stop_in(monkeypatch, make, "decode_to_files", again).code == 130
    assert names(tmp_path) == {"a.mp4", "a.png", "z.safetensors"}  # the old record would call the new latents finished
    with monkeypatch.context() as patch:
        patch.setattr(LongVideoEngine, "denoise", lambda *_, **__: pytest.fail("denoised again"))
        assert make(again).code == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["seed"] == 0
    # A finished one is made again, with its latents.
    before = (tmp_path / "z.safetensors").stat().st_ino
    assert make(again).code == 0
    assert (tmp_path / "z.safetensors").stat().st_ino != before


def test_steps_of_another_run_are_not_thrown_away(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_disk(path: Path, *_: object, **__: object) -> None:
        raise WriteError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(produce, "save_latents", fill_disk)
        assert "after step 4" in make().error
    before = (tmp_path / "a.snapshot.safetensors").read_bytes()
    for more in ({}, {"output.overwrite": "true"}):
        error = make({"sampler.seed": 1} | more).error
        assert error == (
            f"{tmp_path / 'a.snapshot.safetensors'} belongs to another run (sampler.seed was 0, now 1); delete it or move it away"
        )
    assert (tmp_path / "a.snapshot.safetensors").read_bytes() == before


def fill_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_run_killed_at_its_very_end_leaves_is_deleted_by_the_next(make: Make, tmp_path: Path) -> None:
    assert make({"output.save_latents": tmp_path / "kept.safetensors"}).code == 0
    (tmp_path / "a.json").rename(tmp_path / "a.json.old")
    assert "finished already" not in make({"output.save_latents": tmp_path / "kept.safetensors"}).out
    (tmp_path / "a.json.old").unlink()
    # Latents that were to be kept stay, whoever asks; those beside a video that needs them no more go.
    assert "finished already" in make({"output.save_latents": tmp_path / "kept.safetensors"}).out
    assert names(tmp_path) == MADE | {"kept.safetensors"}
    record = json.loads((tmp_path / "a.json").read_text())
    record["config"]["output"]["save_latents"] = None
    (tmp_path / "a.json").write_text(json.dumps(record))
    (tmp_path / "kept.safetensors").rename(tmp_path / "a.latents.safetensors")
    assert "finished already" in make().out
    assert names(tmp_path) == MADE


def test_a_record_whose_video_is_another_or_gone(make: Make, tmp_path: Path) -> None:
    assert make().code == 0
    with (tmp_path / "a.mp4").open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    assert "a.json exists already, and its a.mp4 is another file by now; delete both, choose" in make().error
    (tmp_path / "a.mp4").unlink()
    assert "a.json exists already, and its a.mp4 is gone; delete both, choose" in make().error


@pytest.mark.parametrize("text", ["mine", "", "{}", "[]", '{"identity": 3}', "\0" * 100])
@pytest.mark.parametrize("name", ["a.json", "a.latents.safetensors"])
def test_files_of_another_origin_are_not_taken_for_ours(make: Make, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert f"{tmp_path / name} exists already; choose another name or add --output.overwrite" in make().error
    assert (tmp_path / name).read_text() == text


def test_of_a_file_of_prompts_the_finished_are_skipped(
    make: Make, words: Callable[..., list[str]], no_loading: Callable[[], None], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green square\n")
    settings = {"prompts": prompts, "output.path": tmp_path / "out" / "a.mp4"}
    [ended] = run_forked([words(tmp_path, settings)], tmp_path, fault=partial(kill_in_video, 2))
    assert ended.code == -signal.SIGKILL
    left = names(tmp_path / "out")
    assert {"a-000.json", "a-001.latents.safetensors"} <= left
    assert "a-001.json" not in left
    first = (tmp_path / "out/a-000.json").read_bytes()
    shown = make({"output.path": tmp_path / "out" / "a.mp4"}, "--prompts", prompts)
    lines = shown.out.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines] == ["a-000.mp4", "a-001.mp4", "a-002.mp4"]
    assert ["finished already" in line for line in lines] == [True, False, False]
    assert (tmp_path / "out/a-000.json").read_bytes() == first
    assert names(tmp_path / "out") == {f"a-00{n}.{kind}" for n in range(3) for kind in ("mp4", "png", "json")}
    no_loading()
    assert make({"output.path": tmp_path / "out" / "a.mp4"}, "--prompts", prompts).out.count("finished already") == 3
    # A prompt in another place is another video.
    prompts.write_text("a red circle\na green square\n")
    assert (
        "prompt was 'a blue star', now 'a green square'"
        in make({"output.path": tmp_path / "out" / "a.mp4"}, "--prompts", prompts).error
    )


def kill_in_video(number: int, rank: int) -> None:
    decode_to_files, calls = make_video.decode_to_files, []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_to_files(*args, **kwargs)

    make_video.decode_to_files = count


def test_of_two_runs_with_one_output_the_second_ends_in_one_line(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Real processes, as in two terminals; the second finds the claim of the first, which goes on."""
    fault = partial(start_a_second, words(tmp_path, {"sampler.seed": 2}), tmp_path / "second.json")
    [first] = run_forked([words(tmp_path, {"sampler.seed": 1})], tmp_path, fault=fault)
    code, out, err = json.loads((tmp_path / "second.json").read_text())
    assert first.code == 0, first
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {tmp_path / 'a.mp4'} is being made by process ")
    assert err.endswith("; wait for it, or choose another --output.path\n")
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 1
    assert {name for name in names(tmp_path) if name.startswith(("a", "."))} == MADE


def start_a_second(command: list[str], told: Path, rank: int) -> None:
    """Start another run in the middle of this one, before it loads its model."""
    load = LongVideoEngine.__init__

    def start(self: LongVideoEngine, *args: Any, **kwargs: Any) -> None:
        code = "import sys; from launch.cli.start import run_script; sys.exit(run_script('generate'))"
        place = ("RANK", "WORLD_SIZE")
        environment = {key: value for key, value in os.environ.items() if key not in place}
        arguments = [sys.executable, "-c", code, *command]
        ended = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
        told.write_text(json.dumps([ended.returncode, ended.stdout, ended.stderr]))
        load(self, *args, **kwargs)

    LongVideoEngine.__init__ = start


def test_a_refused_claim_ends_every_rank_together(words: Callable[..., list[str]], tmp_path: Path) -> None:
    with claim([tmp_path / "a.latents.safetensors"], advice="-"):
        ended = run_forked([words(tmp_path)] * 3, tmp_path)
    assert [each.code for each in ended] == [2, 2, 2]
    lines = {each.err for each in ended if each.err}
    assert len(lines) == 1
    assert f"a.latents.safetensors is being made by process {os.getpid()} on " in lines.pop()
    assert not {name for name in names(tmp_path) if name.startswith("a.")}


def test_ranks_go_on_from_latents_together(
    make: Make, words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by one process, continued by three, of which two have no file of the first."""
    tiled = {"decode.mode": "tiled", "decode.tile_height": 16, "decode.tile_width": 16}
    tiled |= {"decode.stride_height": 8, "decode.stride_width": 8}
    assert stop_in(monkeypatch, make, "decode_to_files", tiled).code == 130
    ended = run_forked([words(tmp_path, tiled)] * 3, tmp_path)
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert MADE <= names(tmp_path)
    ended = run_forked([words(tmp_path, tiled)] * 3, tmp_path)
    assert [each.code for each in ended] == [0, 0, 0], ended
    assert "finished already" in ended[0].out


@pytest.mark.parametrize("name", ["a.png", "a.json"])
def test_a_disk_that_fills_up_names_what_could_not_be_written(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = Path.write_text
    with monkeypatch.context() as patch:
        if name == "a.png":
            patch.setattr("PIL.Image.Image.save", fill_disk)
        else:
            patch.setattr(
                Path, "write_text", lambda path, *a, **k: fill_disk() if name in path.name else write(path, *a, **k)
            )
        error = make().error
    assert error.startswith(
        f"cannot write {tmp_path / name}: No space left on device; {tmp_path / 'a.mp4'} is whole; the latents are kept"
    )
    assert "the same command continues from them" in error
    assert make().code == 0
    assert names(tmp_path) == MADE


def test_space_is_needed_for_what_is_not_there_yet(
    make: Make, run: Callable[..., Run], wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and snapshot that fill a disk do not keep the same command from going on with them."""
    settings = {"output.save_latents": tmp_path / "z.safetensors", "sampler.num_steps": 30}
    assert stop_in(monkeypatch, make, "decode_to_files", settings).code == 130
    free: list[int] = []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    free.append(40)
    assert f"{tmp_path} has 40 bytes free, and at least 44 bytes are needed for the video" in make(settings).error
    error = run("decode", tmp_path / "z.safetensors", "--output", tmp_path / "b.mp4").error
    assert "has 40 bytes free, and at least 44 bytes are needed for the video; free some space" in error
    assert names(tmp_path) == {"z.safetensors"}
    free[0] = 50
    assert make(settings).code == 0

    settings = {"output.path": tmp_path / "c.mp4", "sampler.num_steps": 30}
    free[0] = 10**9
    with interrupted_at_forward(13):
        assert make(settings).code == 130
    latents = 4 * load_latents(tmp_path / "z.safetensors")[0].numel()
    kept = (tmp_path / "c.snapshot.safetensors").stat().st_size
    # The solver remembers a sample and two predictions; the rest is what is noted of the steps.
    assert 4 * latents == snapshot_bytes(wan_folder, latents) < kept < 4 * latents + 50_000
    # One snapshot is written beside the one before.
    free[0] = 8 * latents
    assert "are needed for the video and the work on it" in make(settings | {"output.path": tmp_path / "b.mp4"}).error
    free[0] = 4 * latents + 1000
    assert "(continued after step 6)" in make(settings).out


def test_decoding_again_says_that_it_is_done(make: Make, run: Callable[..., Run], tmp_path: Path) -> None:
    assert make({"output.save_latents": tmp_path / "z.safetensors"}).code == 0
    command = (tmp_path / "z.safetensors", "--output", tmp_path / "b.mp4")
    assert run("decode", *command).code == 0
    shown = run("decode", *command)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == f"{tmp_path / 'b.mp4'}: finished already, 17 frames; --overwrite makes it again\n"
    error = run("decode", *command, "--crf", "30").error
    assert error.startswith(f"{tmp_path / 'b.mp4'} exists already; choose another name or add --overwrite; it was made")
    assert "output.crf was 12, now 30" in error
    # Latents of another run.
    assert (
        make(
            {"output.save_latents": tmp_path / "y.safetensors", "output.path": tmp_path / "y.mp4", "sampler.seed": 3}
        ).code
        == 0
    )
    error = run("decode", tmp_path / "y.safetensors", "--output", tmp_path / "b.mp4").error
    assert "sampler.seed was 0, now 3" in error


@pytest.mark.parametrize("name", ["write_picture", "write_record"])
def test_decoding_that_was_stopped_between_its_files_goes_on(
    make: Make, run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert make({"output.save_latents": tmp_path / "z.safetensors"}).code == 0
    command = (tmp_path / "z.safetensors", "--output", tmp_path / "b.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(produce, name, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert run("decode", *command).code == 130
    assert "b.mp4" in names(tmp_path)
    assert "b.json" not in names(tmp_path)
    # One that these latents do not give is not replaced.
    error = run("decode", *command, "--crf", "40").error
    assert error.startswith(f"cannot write {tmp_path / 'b.mp4'}: another file of this name appeared meanwhile; ")
    assert run("decode", *command).code == 0
    for kind in ("mp4", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    # A file that is no video of this size is refused before anything is decoded.
    (tmp_path / "b.json").unlink()
    (tmp_path / "b.mp4").write_bytes(b"mine")
    monkeypatch.setattr(decode, "open_decoder", lambda *_: pytest.fail("the decoder was loaded"))
    error = run("decode", *command).error
    assert error == f"{tmp_path / 'b.mp4'} exists already; choose another name or add --overwrite"


@pytest.mark.parametrize("output", ["b.mp4", "b.gif", "b.webp", "b/"])
def test_every_kind_of_video_is_gone_on_from(
    make: Make, run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    assert make({"output.save_latents": tmp_path / "z.safetensors"}).code == 0
    command = (tmp_path / "z.safetensors", "--output", f"{tmp_path}/{output}")
    with monkeypatch.context() as patch:
        patch.setattr(produce, "write_record", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert run("decode", *command).code == 130
    assert run("decode", *command).code == 0
    assert "finished already" in run("decode", *command).out


def test_decoding_claims_its_files(make: Make, run: Callable[..., Run], tmp_path: Path) -> None:
    assert make({"output.save_latents": tmp_path / "z.safetensors"}).code == 0
    with claim([tmp_path / "b.png"], advice="-"):
        error = run("decode", tmp_path / "z.safetensors", "--output", tmp_path / "b.mp4").error
    assert error.startswith(f"{tmp_path / 'b.png'} is being made by process {os.getpid()} on ")
    assert error.endswith("; wait for it, or choose another --output")


@pytest.mark.parametrize("length", [215, 240])
def test_a_name_that_only_a_temporary_file_is_too_long_for_is_refused_first(
    make: Make, no_loading: Callable[[], None], tmp_path: Path, length: int
) -> None:
    no_loading()
    error = make({"output.path": tmp_path / f"{'x' * length}.mp4"}).error
    assert "File name too long: with the ending of a temporary file it has " in error
    assert names(tmp_path) == set()
