"""generate.py on a small model: the files of a run, and every mistake that needs a checkpoint or a folder to show."""

import csv
import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.files.latents import load_latents
from engine.files.whole import WriteError
from engine.media.read_video import count_frames, read_video
from engine.media.write_video import VideoWriter
from tests.launch.conftest import Run


def names(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_a_video_a_contact_sheet_and_a_record(make: Callable[..., Run], tmp_path: Path) -> None:
    shown = make()
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith(f"{tmp_path / 'a.mp4'}: 17 frames; denoised in ")
    assert shown.out.count("\n") == 1
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json"}
    assert count_frames(tmp_path / "a.mp4") == 17
    with Image.open(tmp_path / "a.png") as sheet:
        assert min(sheet.size) >= 2 * 128
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["prompt"] == "a red circle"
    assert record["seed"] == record["config"]["sampler"]["seed"] == 0
    assert record["config"]["method"]["freespec"]["alpha"] == 5.0
    assert record["latents"]["shape"] == [1, 4, 5, 8, 8]
    assert record["video"]["sha256"] == hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest()
    assert (record["video"]["num_frames"], record["video"]["seconds"]) == (17, 17 / 16)
    assert set(record["seconds"]) == {"load", "text", "denoise", "decode"}
    assert [step["step"] for step in record["steps"]] == [0, 1, 2, 3]
    assert {step["mode"] for step in record["steps"]} <= {"dual", "local"}
    assert record["peak_memory"]["host_bytes"] > 2**20
    assert record["versions"]["torch"] == torch.__version__
    assert record["resumed_at"] == 0


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert make({"output.path": tmp_path / f"{name}.mp4", "sampler.seed": seed}).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()


def test_latents_that_are_kept_decode_to_the_same_video(
    make: Callable[..., Run], run: Callable[..., Run], tmp_path: Path
) -> None:
    assert make({"output.save_latents": tmp_path / "z" / "a.safetensors"}).code == 0
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json", "a.safetensors"}
    latents, metadata = load_latents(tmp_path / "z" / "a.safetensors")
    assert (latents.shape, latents.dtype) == ((1, 4, 5, 8, 8), torch.float32)
    assert json.loads(metadata["record"])["prompt"] == "a red circle"

    shown = run("decode", tmp_path / "z" / "a.safetensors", "--output", tmp_path / "b.mp4")
    assert (shown.code, shown.err) == (0, "")
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert second["decoded_from"] == "a.safetensors"
    for key in ("prompt", "seed", "steps", "latents", "versions"):
        assert first[key] == second[key]

    # Again, with another rate and quality, and the file there already.
    words = (tmp_path / "z" / "a.safetensors", "--output", tmp_path / "b.mp4", "--fps", "8", "--crf", "40")
    assert "exists already; choose another name or add --overwrite" in run("decode", *words).error
    assert run("decode", *words, "--overwrite").code == 0
    assert json.loads((tmp_path / "b.json").read_text())["video"]["seconds"] == 17 / 8
    assert (tmp_path / "b.mp4").stat().st_size < (tmp_path / "a.mp4").stat().st_size


def test_several_prompts_are_numbered(make: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
    shown = make({"output.save_latents": tmp_path / "z.safetensors"}, "--prompts", tmp_path / "prompts.txt")
    assert shown.code == 0
    assert shown.out.count("\n") == 2
    wanted = {f"a-00{i}.{kind}" for i in range(2) for kind in ("mp4", "png", "json")}
    assert names(tmp_path) == wanted | {"prompts.txt", "z-000.safetensors", "z-001.safetensors"}
    records = [json.loads((tmp_path / f"a-00{i}.json").read_text()) for i in range(2)]
    assert [record["prompt"] for record in records] == ["a red circle", "a blue star"]
    assert records[0]["video"]["sha256"] != records[1]["video"]["sha256"]


def test_a_trace_adds_a_table_and_a_plot(make: Callable[..., Run], tmp_path: Path) -> None:
    assert make(None, "--output.trace").code == 0
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json", "a.trace.csv", "a.trace.png"}
    with (tmp_path / "a.trace.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["step"], row["layer"]) for row in rows} == {(str(s), str(n)) for s in range(4) for n in range(2)}


def test_the_trace_changes_nothing(make: Callable[..., Run], tmp_path: Path) -> None:
    assert make().code == 0
    assert make({"output.path": tmp_path / "b.mp4"}, "--output.trace").code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bars_are_on_stderr_if_asked_for(make: Callable[..., Run]) -> None:
    shown = make({"output.progress": "on"})
    assert all(word in shown.err for word in ("load", "denoise", "decode", "mode=", "4/4", "17/17"))
    assert "\r" not in shown.out


def test_the_sheet_shows_the_video_s_frames(make: Callable[..., Run], tmp_path: Path) -> None:
    """The sheet is made of the frames before encoding, which without loss are those of the file but for the colour's grid."""
    assert make({"output.crf": 0}).code == 0
    video = [frame.astype(int) for frame in read_video(tmp_path / "a.mp4")]
    with Image.open(tmp_path / "a.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
    # Two by two cells of 4 x 32 pixels, with labels and gaps between.
    cells = [pixels[y : y + 128 : 4, x : x + 128 : 4] for y in (24, 24 + 160) for x in (24, 24 + 136)]
    for cell, index in zip(cells, (0, 5, 11, 16), strict=True):
        distances = [np.abs(cell - frame).mean() for frame in video]
        assert int(np.argmin(distances)) == index


SETTINGS = {
    "a length that is not 4k + 1": (
        {"video.num_frames": 30},
        "video.num_frames must be 4k + 1, got 30; the nearest are 29 and 33",
    ),
    "a size that is no multiple of 16": (
        {"video.height": 40},
        "must be a multiple of 16, got 40; the nearest are 32 and 48",
    ),
    "a length beyond the rotary table": ({"video.num_frames": 401}, "make at most 253 frames"),
    "negative steps": ({"sampler.num_steps": -3}, "sampler.num_steps must lie in [1, 10000], got -3"),
    "an unknown method": ({"method.name": "freespek"}, "unknown method 'freespek' (did you mean 'freespec'?)"),
    "a folder that is none": ({"model.path": "no/such/folder"}, "no/such/folder"),
    "a quantised complement": (
        {"attention.complement": "sage", "model.device": "cpu"},
        "does not run on cpu; use same",
    ),
    "a kernel that does not run here": ({"attention.kernel": "cuda_flash", "model.device": "cpu"}, "cuda_flash"),
    "latents under a wrong name": ({"output.save_latents": "a.pt"}, "output.save_latents must end in .safetensors"),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_mistake_is_one_line_and_leaves_no_file(make: Callable[..., Run], tmp_path: Path, mistake: str) -> None:
    settings, words = SETTINGS[mistake]
    assert words in make(settings).error
    assert names(tmp_path) == set()


def test_weights_that_are_missing_or_broken(make: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> None:
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    folder = tmp_path / "wan"
    shutil.copytree(wan_folder, folder)
    content = (folder / weights).read_bytes()
    out = {"model.path": folder, "output.path": tmp_path / "out" / "a.mp4"}

    (folder / weights).write_bytes(content[: len(content) // 2])
    assert str(folder / weights) in make(out).error
    (folder / weights).write_bytes(b"not safetensors at all")
    assert str(folder / weights) in make(out).error
    (folder / weights).unlink()
    assert str(folder / "transformer") in make(out).error
    (folder / "model_index.json").unlink()
    assert "model_index.json" in make(out).error
    assert names(tmp_path / "out") == set()


@pytest.mark.parametrize("name", ["a.mp4", "a.json", "a.png", "a.latents.safetensors", "a.trace.csv"])
def test_existing_file_is_kept_without_overwrite(make: Callable[..., Run], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    error = make({"model.path": "/never/read"}, "--output.trace").error
    assert f"{tmp_path / name} exists already" in error
    assert "--output.overwrite" in error
    assert (tmp_path / name).read_text() == "mine"
    assert "/never/read" in make({"model.path": "/never/read"}, "--output.trace", "--output.overwrite").error
    assert (tmp_path / name).read_text() == "mine"


def test_overwriting(make: Callable[..., Run], tmp_path: Path) -> None:
    for name in ("a.mp4", "a.json", "a.png"):
        (tmp_path / name).write_text("old")
    assert make(None, "--output.overwrite").code == 0
    assert count_frames(tmp_path / "a.mp4") == 17
    assert json.loads((tmp_path / "a.json").read_text())["video"]["file"] == "a.mp4"


def test_places_that_cannot_be_written_to(make: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    never = {"model.path": "/never/read"}
    assert "cannot write to the folder" in make(never | {"output.path": tmp_path / "file" / "a.mp4"}).error
    assert "cannot write to the folder" in make(never | {"output.path": "/proc/none/a.mp4"}).error
    assert "is a folder" in make(never | {"output.path": tmp_path / "folder.mp4"}).error
    assert "File name too long" in make(never | {"output.path": tmp_path / f"{'x' * 300}.mp4"}).error
    assert names(tmp_path) == {"file"}


def test_a_full_disk_keeps_the_latents_and_says_how_to_go_on(
    make: Callable[..., Run], run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make({"output.path": tmp_path / "whole.mp4"}).code == 0

    def fill_disk(self: VideoWriter, frames: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", fill_disk)
        error = make().error
    assert f"cannot write {tmp_path / 'a.mp4'}: No space left on device" in error
    assert names(tmp_path) == {"whole.mp4", "whole.png", "whole.json", "a.latents.safetensors"}
    command = error.partition("make the video with: ")[2].split()
    assert command[:2] == ["python", "launch/decode.py"]
    assert run("decode", *command[2:]).code == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_full_disk_before_decoding_is_one_line(
    make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(path: Path, *args: object, **kwargs: object) -> None:
        raise WriteError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("engine.produce.save_latents", fill_disk)
        error = make().error
    assert "a.latents.safetensors: No space left on device; after step 4, which is kept in " in error
    assert error.endswith("; the same command continues from there")
    assert names(tmp_path) == {"a.snapshot.safetensors"}
    assert "(continued after step 4)" in make().out
    assert names(tmp_path) == {"a.mp4", "a.png", "a.json"}


def test_latents_of_another_origin(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "a.mp4")
    weights = wan_folder / "vae/diffusion_pytorch_model.safetensors"
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "does not exist" in run("decode", tmp_path / "none.safetensors", *out).error
    assert "holds no latents" in run("decode", weights, *out).error
    assert "not a whole safetensors file" in run("decode", tmp_path / "text.safetensors", *out).error
    assert "give the file of the latents" in run("decode", *out).error
    assert names(tmp_path) == {"text.safetensors"}
