"""A rank of a replica, alone in this process: its files, its failures, and that steps which were kept are not made again."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.adapters import wan
from engine.batch.files import BatchFiles, ItemFiles, identity_of
from engine.batch.items import FILE, Batch, plan_batch
from engine.batch.make import check_video
from engine.batch.variants import Variant
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.files.latents import load_latents, save_latents
from engine.files.whole import WriteError, file_sha256
from engine.given.frames import GivenFrames, parse_given
from engine.media.read_video import read_video
from engine.media.write_video import VideoWriter, as_comment
from engine.paths import REPOSITORY
from engine.record import video_facts
from launch.batching.worker import Worker, describe, kind_of
from launch.process.exit_codes import LostRankError
from parallel.collectives import CollectiveError
from tests.engine.batch import cases
from tests.engine.media.test_video import comments
from tests.tiny_pipelines import save_random_ltx

EVERY = 2
STEPS = 5


def config_of(folder: Path) -> RunConfig:
    config = cases.config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(folder), device="cpu"),
        sampler=dataclasses.replace(config.sampler, num_steps=STEPS, max_text_tokens=20),
        output=dataclasses.replace(config.output, progress="off"),
    )


@pytest.fixture
def batch(wan_folder: Path) -> Batch:
    suite = cases.suite("a red circle")
    return plan_batch(variants_of(config_of(wan_folder)), suite, seeds=(3,), checkpoint="c", dtype="float32")


def variants_of(config: RunConfig) -> list[Variant]:
    return [Variant.of(config, name) for name in ("freespec", "direct")]


def configs_of(config: RunConfig) -> dict[str, RunConfig]:
    return {variant.label: variant.config for variant in variants_of(config)}


@pytest.fixture
def engine(wan_folder: Path) -> Iterator[LongVideoEngine]:
    with contextlib.closing(LongVideoEngine(config_of(wan_folder))) as engine:
        yield engine


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def worker(engine: LongVideoEngine, told: list[dict[str, Any]], tmp_path: Path) -> Worker:
    def emit(event: str, **fields: Any) -> None:
        told.append({"event": event, **fields})

    (tmp_path / FILE).write_text("{}")
    return Worker(
        engine=engine,
        configs=configs_of(engine.config),
        root=tmp_path,
        snapshot_every=EVERY,
        keep_latents=True,
        emit=emit,
    )


def task_of(batch: Batch, index: int = 0) -> dict[str, Any]:
    item = batch.items[index]
    identity = json.loads(json.dumps(identity_of(item)))
    suite = {"name": "prompts.txt", "sha256": "0"}
    return {"identity": identity, "name": item.name, "suite": suite, "attempt": 1, "replica": "r", "token": "t"}


def files_of(worker: Worker, batch: Batch, index: int = 0) -> ItemFiles:
    return BatchFiles(root=worker.root).of(batch.items[index])


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_an_item_s_files_and_steps(worker: Worker, batch: Batch, told: list[dict[str, Any]]) -> None:
    worker.run(task_of(batch))
    assert [event["event"] for event in told] == ["step"] * STEPS + ["done"]
    files = files_of(worker, batch)
    record = json.loads(files.sidecar.read_text())
    assert record == told[-1]["record"]
    assert record["output"]["sha256"] == file_sha256(files.video)
    assert record["video"]["num_frames"] == len(list(read_video(files.video))) == 17
    assert record["video"]["native_frames"] == 9  # a window of three latent frames: one frame, and twice four
    assert (record["seed"], record["run"]["seed"], record["prompt"]) == (3, 3, "a red circle")
    latents = load_latents(files.latents)[0]
    assert record["latents"]["shape"] == list(latents.shape)
    written = {path.name for path in worker.root.rglob("*") if path.is_file()}
    assert written == {FILE, "p0000-s3.mp4", "p0000-s3.json", "p0000-s3.safetensors"}
    assert BatchFiles(root=worker.root).is_done(batch.items[0], "full")


def test_video_has_metadata_unless_disabled(worker: Worker, batch: Batch, engine: LongVideoEngine) -> None:
    worker.run(task_of(batch))
    files = files_of(worker, batch)
    record = json.loads(files.sidecar.read_text())
    [comment] = comments(files.video)
    assert comment == as_comment(video_facts(record["run"]))
    facts = json.loads(comment)
    assert (facts["prompt"], facts["seed"], facts["method"]["name"]) == ("a red circle", 3, record["method"])
    silent = dataclasses.replace(engine.config, output=dataclasses.replace(engine.config.output, metadata=False))
    worker = dataclasses.replace(worker, configs=configs_of(silent))
    files.sidecar.unlink()
    worker.run(task_of(batch))
    assert comments(files.video) == [None]
    assert json.loads(files.sidecar.read_text())["item_id"] == record["item_id"]


def test_items_do_not_depend_on_their_order(worker: Worker, batch: Batch, engine: LongVideoEngine) -> None:
    """One after another in either order, with methods taken off and put on, or alone: the same bits."""
    alone = engine.denoise("a red circle", seed=3).latents
    for index in (1, 0):
        worker.run(task_of(batch, index))
    assert torch.equal(load_latents(files_of(worker, batch, 0).latents)[0], alone)
    first = files_of(worker, batch, 1).video.read_bytes()
    worker.run(task_of(batch, 1))
    assert files_of(worker, batch, 1).video.read_bytes() == first
    assert not torch.equal(load_latents(files_of(worker, batch, 1).latents)[0], alone)


def test_variants_of_one_method_are_made_with_their_own_settings(
    worker: Worker, engine: LongVideoEngine, tmp_path: Path
) -> None:
    """Settings of the method, and the initial noise, which is not the method's; and back."""
    plain, method, sampler = engine.config, engine.config.method, engine.config.sampler
    other = dataclasses.replace(
        plain,
        method=dataclasses.replace(method, freespec=dataclasses.replace(method.freespec, fused_share=1.0)),
        sampler=dataclasses.replace(sampler, noise="freenoise"),
    )
    variants = [Variant(label="freespec", config=plain), Variant(label="other", config=other)]
    batch = plan_batch(variants, cases.suite("a red circle"), seeds=(3,), checkpoint="c", dtype="float32")
    worker = dataclasses.replace(worker, configs={each.label: each.config for each in variants})
    alone = engine.denoise("a red circle", seed=3).latents
    for index in (1, 0):
        worker.run(task_of(batch, index))
    found = [load_latents(files_of(worker, batch, index).latents)[0] for index in (0, 1)]
    assert torch.equal(found[0], alone)
    with contextlib.closing(LongVideoEngine(other)) as fresh:
        assert torch.equal(found[1], fresh.denoise("a red circle", seed=3).latents)
    assert not torch.equal(*found)


def test_noise_of_the_decoder_comes_from_the_item_s_seed(tmp_path: Path) -> None:
    """An autoencoder of LTX-Video 0.9.5 draws noise: the frames are those of one video made with that seed, not with the batch's."""
    config = config_of(save_random_ltx(tmp_path / "ltx", conditioned=True))
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, max_text_tokens=16))
    suite = cases.suite("a red circle")
    batch = plan_batch(variants_of(config)[1:], suite, seeds=(3,), checkpoint="c", dtype="float32")
    assert config.sampler.seed != 3
    with contextlib.closing(LongVideoEngine(config)) as engine:
        expected = engine.generate("a red circle", seed=3).frames
        other = np.concatenate(list(engine.decode(engine.denoise("a red circle", seed=3).latents)))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / FILE).write_text("{}")
        worker = Worker(
            engine=engine,
            configs=configs_of(config),
            root=tmp_path / "out",
            snapshot_every=EVERY,
            keep_latents=False,
            emit=lambda *_, **__: None,
        )
        record = worker.make(task_of(batch))
    assert record is not None
    hashes = [hashlib.sha256(frames[-1].tobytes()).hexdigest() for frames in (expected, other)]
    assert record["video"]["last_frame_sha256"] == hashes[0] != hashes[1]


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4, 5])
def test_a_killed_item_goes_on_from_its_last_snapshot_to_the_same_bits(
    wan_folder: Path, tmp_path: Path, killed_after: int
) -> None:
    """The snapshot as it lay on the disk when the process ended, and another engine."""
    kept, path = tmp_path / "kept.safetensors", tmp_path / "run.safetensors"

    def kill(finished: int, total: int) -> None:
        if finished == killed_after:
            if path.exists():
                shutil.copy(path, kept)
            raise Killed

    with contextlib.closing(LongVideoEngine(config_of(wan_folder))) as engine:
        whole = engine.denoise("a red circle").latents
        with pytest.raises(Killed):
            engine.denoise("a red circle", snapshot=path, snapshot_every=EVERY, on_step=kill)
    saved = STEPS if killed_after == STEPS else killed_after // EVERY * EVERY
    assert kept.exists() == (saved > 0)
    with contextlib.closing(LongVideoEngine(config_of(wan_folder))) as fresh:
        again = fresh.denoise("a red circle", snapshot=kept)
        assert again.resumed_at == saved
        assert torch.equal(again.latents, whole)


def test_without_a_period_nothing_is_written(engine: LongVideoEngine, tmp_path: Path) -> None:
    engine.denoise("a red circle", snapshot=tmp_path / "run.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every", [0, EVERY])
def test_a_full_disk_ends_the_item_and_its_steps_are_kept(
    worker: Worker, batch: Batch, told: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    worker = dataclasses.replace(worker, snapshot_every=every)

    def full(self: VideoWriter, frames: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            worker.run(task_of(batch))
    assert (told[-1]["kind"], told[-1]["whole"]) == ("disk", False)
    files = files_of(worker, batch)
    assert not files.video.exists()
    assert not files.sidecar.exists()
    worker.run(task_of(batch))
    record = told[-1]["record"]
    assert record["run"]["resumed_at"] == STEPS
    assert [step["step"] for step in record["run"]["steps"]] == list(range(STEPS))
    assert not files.snapshot.exists()


def test_every_item_continues_the_given_video(
    worker: Worker, batch: Batch, engine: LongVideoEngine, told: list[dict[str, Any]], tmp_path: Path
) -> None:
    file, (_, *shape) = tmp_path / "a.safetensors", engine.spec.latent_shape(9, 32, 32)
    save_latents(file, torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)), {})
    given = GivenFrames(extend=file, shows="new")
    planned = given.settings(num_frames=17, fps=engine.config.video.fps, step=engine.spec.temporal_factor)
    plain = worker
    worker = dataclasses.replace(worker, given=parse_given(**json.loads(json.dumps(given.arguments))))
    worker = dataclasses.replace(worker, given_settings=json.loads(json.dumps(planned)))
    worker.run(task_of(batch))
    made, record = load_latents(files_of(worker, batch).latents)[0], told[-1]["record"]
    assert torch.equal(made, engine.denoise("a red circle", seed=3, given=given).latents)
    assert torch.equal(made[:, :, :3], load_latents(file)[0])
    assert record["run"]["given"]["extend"] == {"file": file.name, "start": 0, "stop": 9}
    assert record["video"]["num_frames"] == 17 - 9
    plain.run(task_of(batch))
    assert not torch.equal(load_latents(files_of(plain, batch).latents)[0], made)
    save_latents(file, made[:, :, :3] + 1.0, {})
    worker.run(task_of(batch, 1))
    assert told[-1]["kind"] == "mistake"
    assert told[-1]["message"].startswith("a file of --given or --extend has changed since the batch began")


def test_a_prompt_that_is_too_long_is_one_line_and_the_next_item_is_made(
    worker: Worker, batch: Batch, told: list[dict[str, Any]]
) -> None:
    long = task_of(batch)
    long["identity"]["prompt"] = "x" * 10_000
    worker.run(long)
    assert (told[-1]["event"], told[-1]["kind"], told[-1]["whole"]) == ("failed", "mistake", True)
    assert "sampler.max_text_tokens is 20; shorten it" in told[-1]["message"]
    worker.run(task_of(batch))
    assert told[-1]["event"] == "done"


def test_latents_that_are_not_numbers_are_no_video(
    worker: Worker, batch: Batch, told: list[dict[str, Any]], engine: LongVideoEngine
) -> None:
    weight = engine.pipe.transformer.proj_out.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    worker.run(task_of(batch, 1))
    assert (told[-1]["event"], told[-1]["kind"], told[-1]["whole"]) == ("failed", "mistake", True)
    assert f"numbers of the latents are not finite after step 1 of {STEPS} in float32" in told[-1]["message"]
    assert not files_of(worker, batch, 1).snapshot.exists()
    with torch.no_grad():
        weight.copy_(kept)
    worker.run(task_of(batch, 1))
    assert told[-1]["event"] == "done"


def test_texts_are_encoded_once_for_all_items_and_processes(
    worker: Worker, batch: Batch, engine: LongVideoEngine, wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    adapter = type(engine.adapter)
    encode = adapter.encode_text

    def count(self: wan.WanAdapter, pipe: Any, prompts: list[str], *rest: Any) -> Any:
        encoded.extend(prompts)
        return encode(self, pipe, prompts, *rest)

    monkeypatch.setattr(adapter, "encode_text", count)
    folder = worker.root / "text"
    engine.text.keep(folder)
    for index in (0, 1):
        worker.run(task_of(batch, index))
    with contextlib.closing(LongVideoEngine(config_of(wan_folder))) as other:
        other.text.keep(folder)
        again = other.denoise("a red circle", seed=3).latents
    assert sorted(encoded) == ["", "a red circle"]
    assert torch.equal(again, load_latents(files_of(worker, batch).latents)[0])


def test_a_video_is_checked_by_decoding_all_of_it(worker: Worker, batch: Batch) -> None:
    worker.run(task_of(batch))
    path = files_of(worker, batch).video
    check_video(path, num_frames=17, height=32, width=32)
    for wrong in ({"num_frames": 18}, {"height": 16}):
        with pytest.raises(OSError, match=r"decodes to 17 frames, not 18|frame 0 is 32 x 32, not 16 x 32"):
            check_video(path, **({"num_frames": 17, "height": 32, "width": 32} | wrong))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(OSError, match="decode"):
        check_video(path, num_frames=17, height=32, width=32)


def test_memory_that_runs_out_ends_the_item_with_what_would_fit(told: list[dict[str, Any]], tmp_path: Path) -> None:
    """A real allocation that fails: 64 TiB of noise. The rank ends, since the state of the others is unknown."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this machine promises any memory that is asked for")
    config = config_of(REPOSITORY / "tiny/wan")  # its rotary table is long enough
    config = dataclasses.replace(
        config, video=dataclasses.replace(config.video, height=8192, width=8192, num_frames=4093)
    )
    variants, suite = variants_of(config)[1:], cases.suite("a red circle")
    planned = plan_batch(variants, suite, seeds=(3,), checkpoint="c", dtype="float32")
    with contextlib.closing(LongVideoEngine(config)) as engine:

        def emit(event: str, **fields: Any) -> None:
            told.append({"event": event, **fields})

        (tmp_path / FILE).write_text("{}")
        worker = Worker(
            engine=engine,
            configs=configs_of(config),
            root=tmp_path,
            snapshot_every=EVERY,
            keep_latents=True,
            emit=emit,
        )
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            worker.run(task_of(planned))
    (failed,) = told
    assert (failed["event"], failed["kind"], failed["whole"]) == ("failed", "memory", False)
    assert failed["message"].startswith("out of memory while making an item (")
    assert failed["message"].endswith("; in another folder also --decode.mode tiled, or a shorter or smaller video")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [FILE]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk", "No space left"),
        (UserError("[Errno 28] No space left on device: 'x'"), "disk", "No space left"),
        (WriteError(errno.EPERM, "Operation not permitted", "a.mp4"), "disk", "cannot write a.mp4: Operation not"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "disk", "Permission denied: 'a'"),
        (OSError(errno.EIO, "Input/output error"), "disk", "Input/output"),
        (OSError(errno.ESTALE, "Stale file handle"), "disk", "Stale"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "disk", "timed out"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), "disk", "Transport endpoint"),
        (OSError("I/O error: Stale file handle (os error 116)"), "disk", "Stale"),  # of a library, without errno
        (UserError("rank 1: [Errno 116] Stale file handle: 'x'"), "disk", "Stale"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "fault", "Is a directory"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "fault", "too long"),
        (UserError("too long"), "mistake", "too long"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "memory", "would fit"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory", ".weights cpu_offload"),
        (CollectiveError(0, "step 2", "all-to-all", (0, 1), "timed out"), "lost", "all-to-all"),
        (LostRankError("rank 0, step 2 layer 1: lost"), "lost", "step 2"),
        (KeyError("x"), "fault", "KeyError"),
        (OSError("a.mp4 decodes to 3 frames"), "fault", "3 frames"),
    ],
)
def test_every_failure_has_a_kind_and_a_line(error: Exception, kind: str, words: str) -> None:
    assert kind_of(error) == kind
    assert words in describe(error)
    assert "\n" not in describe(error)
