"""Checkpoints by hub name, from a local copy laid out as the hub's client lays it out: offline, unfinished, and recorded."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch

import engine.load.checkpoint
import engine.load.hub
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load.checkpoint import open_checkpoint
from engine.load.hub import fetch
from engine.load.pipeline import load_pipeline
from engine.load.provenance import describe_weights, sha256_of
from engine.planner.model import read_model
from tests.original_layout import wan_transformer
from tests.tiny_pipelines import save_random_wan

NAME, COMMIT = "someone/tiny-wan", "0123456789abcdef0123456789abcdef01234567"
MODEL = ModelConfig(path=NAME, device="cpu", offline=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan") / "whole")


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of NAME at COMMIT, which is its default branch, in a local copy of the hub that is this test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--someone--tiny-wan"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    return home / "snapshots" / COMMIT


def refusal(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_pipeline(config)
    assert "\n" not in str(caught.value)


def run_config(model: ModelConfig) -> RunConfig:
    return RunConfig(
        model=model,
        video=VideoConfig(num_frames=9, height=32, width=32),
        sampler=SamplerConfig(num_steps=1, guidance_scale=1.0, max_text_tokens=20),
        method=MethodConfig(name="direct", window_frames=3),
        output=OutputConfig(progress="off"),
    )


def recorded(model: ModelConfig) -> dict[str, Any]:
    engine = LongVideoEngine(run_config(model))
    record = json.loads(json.dumps(engine.generate("a red circle").record))
    engine.close()
    return record["model"]


@pytest.mark.usefixtures("snapshot")
def test_a_hub_name_loads_offline_and_the_record_names_its_commit() -> None:
    by_branch = recorded(MODEL)
    assert (by_branch["path"], by_branch["revision"], by_branch["commit"]) == (NAME, None, COMMIT)
    assert "sha256" not in by_branch
    assert recorded(dataclasses.replace(MODEL, revision=COMMIT))["commit"] == COMMIT


@pytest.mark.usefixtures("snapshot")
def test_what_the_local_copy_does_not_hold_is_one_line_offline() -> None:
    refusal(
        dataclasses.replace(MODEL, path="someone/else"), r"model\.offline is true, and .* does not hold 'someone/else'"
    )
    refusal(
        dataclasses.replace(MODEL, revision="v2"), r"does not hold 'someone/tiny-wan' at revision v2; download it first"
    )
    with pytest.raises(UserError, match=r"model\.offline is true, and neither .* describes 'someone/else'"):
        read_model(dataclasses.replace(MODEL, path="someone/else"))


@pytest.mark.usefixtures("snapshot")
def test_the_client_s_own_offline_mode_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    online = dataclasses.replace(MODEL, offline=False)
    assert load_pipeline(online, with_text=False).transformer is not None
    refusal(dataclasses.replace(online, path="someone/else"), "the hub has no such checkpoint or cannot be reached")


def test_downloads_that_did_not_finish_are_named(snapshot: Path) -> None:
    weights = next((snapshot / "vae").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refusal(MODEL, r"vae/.*\.safetensors is broken or cut short")
    weights.unlink()
    refusal(MODEL, "vae has no weights; fetch the .safetensors files of this checkpoint")
    (snapshot.parent.parent / "blobs" / "abc.incomplete").touch()
    refusal(MODEL, r"vae has no weights \(abc\.incomplete did not finish\)")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    weights.with_name("one.safetensors").write_bytes(whole)
    weights.with_name("x.safetensors.index.json").write_text(json.dumps(index))
    refusal(MODEL, r"vae lacks two\.safetensors of 2 shards \(abc\.incomplete did not finish\); finish the download")


def test_downloads_into_a_folder_that_did_not_finish_are_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "wan"
    shutil.copytree(folder, broken)
    next((broken / "vae").glob("*.safetensors")).unlink()
    begun = broken / ".cache" / "huggingface" / "download" / "vae"
    begun.mkdir(parents=True)
    (begun / "def.incomplete").touch()
    (broken / "vae" / "model.safetensors.aria2").touch()
    local = ModelConfig(path=str(broken), device="cpu")
    refusal(local, r"vae has no weights \(def\.incomplete, model\.safetensors\.aria2 did not finish\)")
    shutil.copy(next((folder / "vae").glob("*.safetensors")), broken / "vae")
    (broken / "tokenizer" / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    refusal(local, r"spiece\.model is a pointer of git-lfs and not the file itself")


def test_a_copy_that_the_client_knows_to_be_unfinished_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = huggingface_hub.errors.IncompleteSnapshotError

    def incomplete(*_args: Any, **_settings: Any) -> str:
        raise kind("2 file(s) are missing (a, b)\nmore", snapshot_path="nowhere")

    monkeypatch.setattr(engine.load.hub, "snapshot_download", incomplete)
    refusal(
        MODEL, r"is incomplete and the hub cannot be reached; finish the download .*2 file\(s\) are missing \(a, b\)"
    )


def test_only_safetensors_and_their_descriptions_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr(engine.load.hub, "snapshot_download", download)
    fetch(NAME, "v2", parts=("vae", "text_encoder"))
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == (NAME, "v2", False)
    files = ["vae/a.safetensors", "text_encoder/config.json", "tokenizer/spiece.model", "model_index.json"]
    refused = [
        "vae/a.bin",
        "vae/a.pt",
        "text_encoder/pytorch_model.bin",
        "tokenizer/a.pkl",
        "transformer/a.safetensors",
    ]
    kept = huggingface_hub.utils.filter_repo_objects([*files, *refused], allow_patterns=asked["allow_patterns"])
    assert list(kept) == files


def test_the_record_of_a_folder_has_the_sha256_of_every_file_that_is_read(folder: Path) -> None:
    found = recorded(ModelConfig(path=str(folder), device="cpu"))["sha256"]
    weights = [str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")]
    assert len(weights) == 3
    assert set(weights) | {"model_index.json", "vae/config.json", "tokenizer/tokenizer.json"} <= set(found)
    for name, digest in found.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before = sha256_of(file)
    file.write_bytes(b"three")
    assert before != sha256_of(file) == hashlib.sha256(b"three").hexdigest()


def test_weights_that_change_anywhere_are_another_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, sizes and beginnings: only the end of a file differs, or one stretch in the middle of a large one."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    file = next((copied / "transformer").glob("*.safetensors"))
    whole = file.read_bytes()

    def print_of(data: bytes) -> str:
        file.write_bytes(data)
        return open_checkpoint(ModelConfig(path=str(copied))).digest

    def with_zeros(start: int, count: int) -> str:
        return whole[:start] + bytes(count) + whole[start + count :]

    monkeypatch.setattr(engine.load.checkpoint, "_HEAD_BYTES", 1024)
    before = print_of(whole)
    assert before == print_of(whole)
    middle = len(whole) // 2
    assert len({before, print_of(with_zeros(len(whole) - 4, 4)), print_of(with_zeros(middle, 4))}) == 3
    # A large file is sampled: a stretch as long as the distance of two samples is seen wherever it lies.
    monkeypatch.setattr(engine.load.checkpoint, "_WHOLE_BYTES", 1024)
    monkeypatch.setattr(engine.load.checkpoint, "_SAMPLE_EVERY", 512)
    monkeypatch.setattr(engine.load.checkpoint, "_SAMPLE_BYTES", 16)
    sampled = print_of(whole)
    assert sampled != before
    for start in (middle, middle + 100, middle + 300, len(whole) - 512):
        assert print_of(with_zeros(start, 512)) != sampled


def test_a_checkpoint_is_what_is_loaded_of_its_folder(folder: Path, tmp_path: Path) -> None:
    """A card that is written again makes no other videos; a configuration does."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)

    def print_of() -> str:
        return open_checkpoint(ModelConfig(path=str(copied))).digest

    before, said = print_of(), describe_weights(ModelConfig(path=str(copied)))["sha256"]
    for name in ("README.md", "figures.json", "transformer/notes.txt", "samples/a.json"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("{}")
    assert print_of() == before
    assert describe_weights(ModelConfig(path=str(copied)))["sha256"] == said
    config = copied / "scheduler/scheduler_config.json"
    config.write_text(config.read_text() + "\n")
    seen = {before, print_of()}
    for name in ("spiece.model", "merges.txt"):  # of the tokenizers of others
        (copied / "tokenizer" / name).write_text("another")
        seen.add(print_of())
    assert len(seen) == 4
    assert print_of() != before


def test_single_file_is_recorded_and_changes_the_digest(folder: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(next((folder / "transformer").glob("*.safetensors")))
    prints = {}
    for scale in (1.0, 2.0):
        file = tmp_path / f"{scale}" / "wan.safetensors"
        file.parent.mkdir()
        safetensors.torch.save_file({wan_transformer(key): tensor * scale for key, tensor in tensors.items()}, file)
        model = ModelConfig(path=str(folder), single_file=str(file), device="cpu")
        said = describe_weights(model)["single_file"]
        assert said == {"name": "wan.safetensors", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        prints[scale] = open_checkpoint(model).digest
    alone = open_checkpoint(ModelConfig(path=str(folder))).digest
    assert len({alone, *prints.values()}) == 3


def test_a_single_file_of_the_hub_is_recorded_with_its_commit(folder: Path, snapshot: Path) -> None:
    tensors = safetensors.torch.load_file(next((folder / "transformer").glob("*.safetensors")))
    file = snapshot / "split" / "wan.safetensors"
    file.parent.mkdir()
    safetensors.torch.save_file({wan_transformer(key): tensor for key, tensor in tensors.items()}, file)
    model = ModelConfig(path=str(folder), single_file=f"{NAME}/split/wan.safetensors", device="cpu", offline=True)
    assert describe_weights(model)["single_file"]["commit"] == COMMIT
    assert load_pipeline(model, with_text=False).transformer is not None
