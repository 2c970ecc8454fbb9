"""decode.py: its options for model and decoding, and mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.launch.conftest import LTX, Run


@pytest.fixture
def kept(make: Callable[..., Run], tmp_path: Path) -> Path:
    """Latents that a run kept."""
    path = tmp_path / "kept.safetensors"
    assert make({"output.save_latents": path}).code == 0
    return path


def test_settings_of_decoding_are_used_and_recorded(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    tiles = {"mode": "tiled", "tile_height": 16, "tile_width": 16, "stride_height": 8, "stride_width": 8}
    words = [f"--decode.{key}={value}" for key, value in tiles.items()]
    assert run("decode", kept, "--output", tmp_path / "b.mp4", *words).code == 0
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["config"]["decode"].items() >= tiles.items()
    assert record["decode"]["mode"] == "tiled"
    first = json.loads((tmp_path / "a.json").read_text())
    assert first["config"]["decode"]["mode"] == "auto"
    assert record["video"]["sha256"] != first["video"]["sha256"]


def test_ltx_video_piece_by_piece_and_in_tiles(
    run: Callable[..., Run], make: Callable[..., Run], tmp_path: Path
) -> None:
    """Its latents decode as the run did, and in each of the modes that cut its video, to as many frames."""
    path = tmp_path / "kept.safetensors"
    assert make(LTX | {"output.save_latents": path}).code == 0
    first = json.loads((tmp_path / "a.json").read_text())
    assert run("decode", path, "--output", tmp_path / "b.mp4").code == 0
    assert json.loads((tmp_path / "b.json").read_text())["video"]["sha256"] == first["video"]["sha256"]
    pieces = ("--decode.tile_frames=8", "--decode.stride_frames=4")
    tiles = [f"--decode.{kind}_{side}=16" for kind in ("tile", "stride") for side in ("height", "width")]
    for mode, words in (("framewise", pieces), ("tiled", [*pieces, *tiles])):
        out = tmp_path / f"{mode}.mp4"
        assert run("decode", path, "--output", out, f"--decode.mode={mode}", *words).code == 0
        record = json.loads(out.with_suffix(".json").read_text())
        assert record["decode"]["mode"] == mode
        assert record["video"]["num_frames"] == first["video"]["num_frames"] == 17
        assert record["video"]["sha256"] != first["video"]["sha256"]


def test_records_with_absurd_parts(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    with safe_open(kept, "pt") as file:
        latents, record = file.get_tensor("latents"), json.loads(file.metadata()["record"])
    strange = tmp_path / "strange.safetensors"
    absurd = {"identity": 5, "versions": [], "prompt": {"a": 1}}
    save_file({"latents": latents}, strange, {"record": json.dumps(record | absurd)})
    assert run("decode", strange, "--output", tmp_path / "b.mp4").code == 0
    save_file({"latents": latents}, strange, {"record": json.dumps(record | {"note": float("nan")})})
    error = run("decode", strange, "--output", tmp_path / "c.mp4").error
    assert "holds NaN or infinity; give latents that launch/generate.py saved" in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model.dtype", "float16"), "unknown setting"),
        (("--progress", "maybe"), "progress"),
        (("--fps", str(2**40)), "video.fps must lie in [1, 1000], got 1099511627776"),
        (("--output", "a\0b.mp4"), "has a zero byte, which no file name has"),
        (("--decode.stride_height", "999"), "decode.stride_height must lie in [1, decode.tile_height]"),
        (("--model.path", "~nosuchuser/model"), "nosuchuser"),
        (("--decode.mode", "framewise"), "decode.mode framewise is for decoders that take the whole video at once"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Callable[..., Run], kept: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    assert line in run("decode", kept, "--output", tmp_path / "b.mp4", *words).error
    assert not (tmp_path / "b.mp4").exists()


def test_unknown_home_is_one_line(run: Callable[..., Run], kept: Path, tmp_path: Path) -> None:
    assert "nosuchuser" in run("decode", "~nosuchuser/a.safetensors", "--output", tmp_path / "b.mp4").error
    assert "nosuchuser" in run("decode", kept, "--output", "~nosuchuser/b.mp4").error


def test_a_name_that_is_too_long_is_one_line(run: Callable[..., Run], tmp_path: Path) -> None:
    for words in (["decode", "x" * 300, "--output", tmp_path / "b.mp4"], ["plan", "--extend", f"{'x' * 300}.mp4"]):
        assert run(*words).error.endswith("x: File name too long")


def read(kept: Path) -> tuple[torch.Tensor, Any]:
    """Latents and record of a file."""
    with safe_open(kept, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["record"])


@pytest.fixture
def decode_other(run: Callable[..., Run], tmp_path: Path) -> Callable[..., str]:
    """`decode_other(latents, record)`: the line that a file with these ends in."""

    def call(latents: torch.Tensor, record: Any) -> str:
        save_file({"latents": latents}, tmp_path / "other.safetensors", metadata={"record": json.dumps(record)})
        error = run("decode", tmp_path / "other.safetensors", "--output", tmp_path / "b.mp4").error
        assert not (tmp_path / "b.mp4").exists()
        return error

    return call


def test_a_record_of_another_version_is_refused(decode_other: Callable[..., str], kept: Path) -> None:
    latents, record = read(kept)
    record["config"]["decode"]["of_the_future"] = 1
    error = decode_other(latents, record)
    assert "settings that this version does not know" in error
    assert "of_the_future" in error


def test_what_made_the_latents_is_not_checked_again_and_stays_in_the_record(
    run: Callable[..., Run], kept: Path, tmp_path: Path
) -> None:
    """Settings that this version refuses or does not know; decoding reads none of them."""
    latents, record = read(kept)
    record["config"]["sampler"]["of_the_future"] = 1
    record["config"]["attention"]["riflex"] = {"enabled": False, "index": 2, "repetition": None}
    save_file({"latents": latents}, tmp_path / "old.safetensors", metadata={"record": json.dumps(record)})
    assert run("decode", tmp_path / "old.safetensors", "--output", tmp_path / "b.mp4").code == 0
    made = json.loads((tmp_path / "b.json").read_text())["config"]
    assert (made["sampler"], made["attention"]) == (record["config"]["sampler"], record["config"]["attention"])
    assert made["output"]["path"] == str(tmp_path / "b.mp4")


def test_a_record_that_lacks_something_is_refused(decode_other: Callable[..., str], kept: Path) -> None:
    latents, record = read(kept)
    for name, value in (("config", None), ("config", []), ("seed", "3"), ("seed", None), ("seconds", 1.5)):
        assert f"has {value!r} for its {name}; give latents" in decode_other(latents, record | {name: value})
    wrong = [("timeline", value) for value in (5, [5], [{"text": "a"}], [{"text": 1, "start": 0, "stop": 9}])]
    given = {"images": [], "extend": {"file": "a", "start": 0, "stop": 9}, "shows": "new"}
    wrong += [
        ("given", value) for value in ([], {"shows": 1}, given | {"extend": None}, given | {"extend": {"stop": "9"}})
    ]
    for name, value in wrong:
        assert f"for its {name}; give latents" in decode_other(latents, record | {name: value})
    error = decode_other(latents, record | {"given": given | {"extend": {"stop": 17}}})
    assert error.endswith("claims to continue 17 frames, but has 17; give latents that launch/generate.py saved")
    assert "is [1, 2] instead of a mapping; give latents" in decode_other(latents, [1, 2])
    assert "has None for its config" in decode_other(latents, {})
    for group, name in (("model", "device"), ("model", "shards"), ("video", "fps"), ("output", "crf")):
        config = record["config"] | {group: record["config"][group] | {name: None}}
        assert "settings that this version does not know" in decode_other(latents, record | {"config": config})
    for wrong in (None, 5, True, []):
        error = decode_other(latents, record | {"config": record["config"] | {"decode": wrong}})
        assert f"settings that this version does not know: decode is {wrong!r}" in error
    record["config"].pop("model")
    assert "settings that this version does not know" in decode_other(latents, record)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool, torch.complex64])
def test_latents_of_another_dtype_are_refused(decode_other: Callable[..., str], kept: Path, dtype: torch.dtype) -> None:
    latents, record = read(kept)
    name = str(dtype).removeprefix("torch.")
    assert f"holds latents of {name}, and generate.py saves float32" in decode_other(latents.to(dtype), record)


@pytest.mark.parametrize("dtype", ["F4", "XX", "5", "[]"])
def test_latents_of_no_dtype_are_one_line(run: Callable[..., Run], kept: Path, tmp_path: Path, dtype: str) -> None:
    data = kept.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'"F32"', json.dumps(dtype).encode())
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[-4 * 4 * 5 * 4 * 4 :])
    error = run("decode", tmp_path / "b.safetensors", "--output", tmp_path / "b.mp4").error
    assert "is not a whole safetensors file" in error


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 3000 + "]" * 3000, "is nested too deeply; give latents"),
        ('{"seed": ' + "9" * 5000 + "}", "holds a number that is too long"),
        ('{"seed": "\\ud800"}', "holds text that is not Unicode"),
    ],
    ids=["nested", "digits", "surrogate"],
)
def test_foreign_record_is_one_line(run: Callable[..., Run], kept: Path, tmp_path: Path, text: str, line: str) -> None:
    save_file({"latents": read(kept)[0]}, tmp_path / "b.safetensors", metadata={"record": text})
    assert line in run("decode", tmp_path / "b.safetensors", "--output", tmp_path / "b.mp4").error


def test_latents_that_the_model_does_not_make_are_refused(decode_other: Callable[..., str], kept: Path) -> None:
    latents, record = read(kept)
    for wrong in (
        latents[:, :3].contiguous(),
        latents[0].contiguous(),
        latents[:, :, :0],
        latents.expand(2, -1, -1, -1, -1),
    ):
        shape = list(wrong.shape)
        assert f"the shape {shape}, and this model's are [1, 4, frames, rows, columns]; give" in decode_other(
            wrong.contiguous(), record
        )
    latents[0, 0, 0, 0, :2] = torch.nan
    assert f"2 of {latents.numel()} numbers of the latents are not finite in " in decode_other(latents, record)
