"""Files that are whole or absent, whatever moment a process is killed at."""

import errno
import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from engine.batch import store
from engine.batch.files import BatchFiles
from engine.batch.locks import Shard, locked, own_shard
from engine.batch.plan import claim_folder
from engine.batch.store import compile_manifest, file_sha256, is_done, publish, sweep, write_json, writing_to
from engine.errors import UserError
from tests.engine.batch.cases import batch, check_bytes, content, write_item
from tests.ranks import PRELOAD

KILLED = 99
# Python reports these before it does them; with `fsync` they are all moments at which the disk changes.
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir")


def work(root: Path) -> None:
    """A batch of one item, as a driver and a worker do it."""
    files, small = BatchFiles(root=root), batch("a", methods=("direct",), seeds=(0,))
    with own_shard(root, Shard()):
        claim_folder(root, small)
        done = [item for item in small.items if files.is_done(item, "full")]
        todo = [item for item in small.items if item not in done]
        files.tidy(done=done, todo=todo)
        for item in todo:
            write_item(files, item)
        files.write_manifest()


def killed(root: Path, boundary: int) -> None:
    """`work`, in a process that ends without a word just before its n-th change of the folder."""
    left = boundary

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in CHANGES and str(root) in str(arguments[0]):
            left -= 1
            if left == 0:
                os._exit(KILLED)

    sys.addaudithook(count)
    work(root)
    os._exit(0)


def in_process(root: Path, boundary: int) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=killed, args=(root, boundary))
    process.start()
    process.join()
    return process.exitcode


def tree_of(root: Path) -> dict[str, bytes]:
    kept = (path for path in root.rglob("*") if path.is_file() and "locks" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def assert_nothing_half(root: Path) -> None:
    """A sidecar or a manifest stands only beside what it says."""
    files = BatchFiles(root=root)
    for sidecar in files.sidecars():
        output = json.loads(sidecar.read_text())["output"]
        assert file_sha256(sidecar.with_name(output["file"])) == output["sha256"]
    if (root / "batch.json").exists():
        json.loads((root / "batch.json").read_text())
    if (root / "manifest.jsonl").exists():
        rows = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
        assert [row["status"] for row in rows] == ["done"]


def test_killed_at_every_boundary_and_started_again(tmp_path: Path) -> None:
    """Every number of changes up to the last: nothing half is ever believed, and the next run ends in the same bytes."""
    whole = tmp_path / "whole"
    whole.mkdir()
    work(whole)
    expected, boundary, codes = tree_of(whole), 0, [KILLED]
    while codes[-1] == KILLED:
        boundary += 1
        root = tmp_path / f"killed{boundary}"
        root.mkdir()
        codes.append(in_process(root, boundary))
        assert_nothing_half(root)
        work(root)
        assert tree_of(root) == expected, boundary
    assert codes[-1] == 0
    assert boundary > 15


def test_the_sidecar_comes_last_or_the_test_above_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check against a worker that writes its sidecar before its video has its name."""

    def hasty(part: Path, final: Path, **_: object) -> store.FileFacts:
        facts = store.FileFacts(file=final.name, bytes=part.stat().st_size, sha256=file_sha256(part))
        write_json(final.with_suffix(".json"), {"output": {"file": facts.file, "sha256": facts.sha256}})
        raise KeyboardInterrupt  # killed here

    monkeypatch.setattr("tests.engine.batch.cases.publish", hasty)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path)
    with pytest.raises(FileNotFoundError):
        assert_nothing_half(tmp_path)


def test_done_means_this_item_and_this_file(tmp_path: Path) -> None:
    files, items = BatchFiles(root=tmp_path), batch().items
    item = items[0]
    assert not files.is_done(item, "full")
    write_item(files, item)
    assert files.is_done(item, "full")
    video, sidecar = files.of(item).video, files.of(item).sidecar
    data = bytearray(content(item))
    data[40] ^= 1
    video.write_bytes(data)
    assert is_done(sidecar, item.item_id, verify="size")
    assert not is_done(sidecar, item.item_id, verify="full")
    video.write_bytes(data[:-1])
    assert not is_done(sidecar, item.item_id)
    video.unlink()
    assert not is_done(sidecar, item.item_id)
    with pytest.raises(UserError, match="belongs to another result"):
        is_done(sidecar, "other")
    sidecar.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        is_done(sidecar, item.item_id)


def test_a_file_that_fails_its_check_gets_no_name(tmp_path: Path) -> None:
    part = tmp_path / "a.mp4.part"
    part.write_bytes(b"\x09\0\0\0")
    with pytest.raises(OSError, match="is not whole"):
        publish(part, tmp_path / "a.mp4", check=check_bytes)
    assert not (tmp_path / "a.mp4").exists()
    assert sweep(tmp_path) == [part]
    assert list(tmp_path.iterdir()) == []


def test_json_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_disk_that_takes_nothing_is_one_line_and_other_errors_pass(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        with pytest.raises(UserError, match=rf"cannot write to {tmp_path}: .* bytes are free\); go on") as caught:
            with writing_to(tmp_path, after="go on"):
                raise OSError(number, os.strerror(number))
        assert "\n" not in str(caught.value)
    with pytest.raises(PermissionError):
        with writing_to(tmp_path, after="go on"):
            raise OSError(errno.EACCES, "Permission denied")


def test_a_manifest_does_not_depend_on_the_order(tmp_path: Path) -> None:
    for name in "cab":
        write_json(tmp_path / f"{name}.json", {"name": name})
    paths = sorted(tmp_path.glob("*.json"))
    assert compile_manifest(tmp_path / "one", paths, dict) == 3
    compile_manifest(tmp_path / "two", paths[::-1], dict)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != b""


def test_quarantine_keeps_every_traceback_and_lets_go(tmp_path: Path) -> None:
    files, item = BatchFiles(root=tmp_path), batch().items[0]
    attempt = {"attempt": 1, "kind": "fault", "message": "m", "traceback": "Traceback: here", "replica": "r"}
    text = files.put_into_quarantine(item, error="m", attempts=[attempt, attempt | {"attempt": 2}])
    assert text.read_text().count("Traceback: here") == 2
    assert files.quarantined(item)["attempts"][1] == {"attempt": 2, "kind": "fault", "message": "m", "replica": "r"}
    assert files.write_manifest() == 1
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["status"] == "quarantined"
    files.release(item)
    assert files.quarantined(item) is None
    assert list(files.quarantine.iterdir()) == []


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard must be i/n with 1 <= i <= n"):
        Shard.parse(text)


def test_every_item_is_in_exactly_one_shard() -> None:
    shards = [Shard.parse(f"{i}/3") for i in (1, 2, 3)]
    assert all(sum(shard.holds(position) for shard in shards) == 1 for position in range(100))


def test_one_driver_per_shard(tmp_path: Path) -> None:
    with own_shard(tmp_path, Shard(index=1, count=2)):
        with own_shard(tmp_path, Shard(index=2, count=2)):
            pass
        with pytest.raises(UserError, match=rf"another driver works on shard-1-of-2 of .*: process {os.getpid()} on "):
            with own_shard(tmp_path, Shard(index=1, count=2)):
                pass
        with pytest.raises(UserError, match=r"worked on as shard-1-of-2 .* the same n .* this one has 1"):
            with own_shard(tmp_path, Shard()):
                pass
    with own_shard(tmp_path, Shard()):
        pass


def test_a_driver_on_another_machine_is_seen_by_its_status(tmp_path: Path) -> None:
    """Where a file system's locks end at the machine."""
    (tmp_path / "status").mkdir()
    status = {"host": "other", "state": "running", "time": 2**40, "pid": 1}
    write_json(tmp_path / "status/shard-1-of-1.json", status)
    with pytest.raises(UserError, match="another driver works on"):
        with own_shard(tmp_path, Shard()):
            pass
    write_json(tmp_path / "status/shard-1-of-1.json", status | {"time": 0})
    with own_shard(tmp_path, Shard()):
        pass


def test_a_lock_is_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "a.lock"):
        pass
    with locked(tmp_path / "a.lock"):
        pass
