"""Files are complete or absent, at whatever moment a process is killed."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from engine.batch import store
from engine.batch.files import BatchFiles
from engine.batch.items import check_folder, claim_folder, requested_items
from engine.batch.journal import read_status, table
from engine.batch.locks import Shard, lock_file, own_shard
from engine.batch.store import compile_manifest, is_done, publish
from engine.errors import UserError
from engine.files.trees import read_json
from engine.files.whole import file_sha256, write_json
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
    """`work` in a process that exits silently just before its n-th change of the folder."""
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
    """A sidecar or a manifest exists only beside the files that it describes."""
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
    """For every number of changes: incomplete files are never accepted, and the next run ends with the same bytes."""
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


def test_a_file_that_fails_its_check_gets_no_name(tmp_path: Path) -> None:
    part = tmp_path / "a.mp4.part"
    part.write_bytes(b"\x09\0\0\0")
    with pytest.raises(OSError, match="is not whole"):
        publish(part, tmp_path / "a.mp4", check=check_bytes)
    assert not (tmp_path / "a.mp4").exists()


def test_a_manifest_does_not_depend_on_the_order(tmp_path: Path) -> None:
    for name in "cab":
        write_json(tmp_path / f"{name}.json", {"name": name})
    paths = sorted(tmp_path.glob("*.json"))
    assert compile_manifest(tmp_path / "one", paths, read_json).rows == 3
    compile_manifest(tmp_path / "two", paths[::-1], read_json)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() != b""


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "{", '{"item_id": "x", "status": "done"}', '{"status": "quarantined"}']
)
@pytest.mark.parametrize("place", ["quarantine/x.json", "direct/000000000000/videos/notes.json"])
def test_foreign_json_is_left_out_of_the_manifest(tmp_path: Path, place: str, text: str) -> None:
    """It may be put there while the batch runs: what was made stays listed, and the file is named."""
    files, item = BatchFiles(root=tmp_path), batch().items[0]
    write_item(files, item)
    foreign = tmp_path / place
    foreign.parent.mkdir(parents=True)
    foreign.write_text(text)
    manifest = files.write_manifest()
    assert manifest.rows == 1
    (line,) = manifest.left_out
    assert line.startswith(f"{foreign} is not ")
    assert line.endswith("; move it away")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not JSON (Expecting value: "),
        ("{", "is not JSON (Expecting property name"),
        ("\0" * 50, "is not JSON ("),
        ("null", "is not the sidecar of a result: it holds no keys"),
        ("[]", "is not the sidecar of a result: it holds no keys"),
        ("{}", "is not the sidecar of a result: it has no item_id"),
        ('{"item_id": 3}', "is not the sidecar of a result: item_id is 3"),
        ('{"item_id": "x", "output": []}', "is not the sidecar of a result: it has no output.file"),
        ('{"item_id": "x", "output": {"file": "a", "bytes": "b"}}', "output.bytes is 'b'"),
        (
            '{"item_id": "x", "output": {"file": "/etc/passwd", "bytes": 1, "sha256": ""}}',
            "names the file '/etc/passwd'",
        ),
        ("[" * 5000, "is nested too deeply"),
        ("9" * 5000, "holds a number that is too long"),
    ],
)
def test_a_damaged_sidecar_costs_its_item_alone(tmp_path: Path, text: str, why: str) -> None:
    sidecar, said = tmp_path / "a.json", []
    sidecar.write_text(text)
    assert not is_done(sidecar, "x", say=said.append)
    (line,) = said
    assert line.startswith(
        f"{sidecar} {why if why.startswith(('is', 'names', 'holds')) else 'is not the sidecar of a result: '}"
    )
    assert why in line
    assert line.endswith("; it is made again")


def test_unreadable_sidecar_is_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    (tmp_path / "b.json").mkdir()
    for name in "ab":
        assert not is_done(tmp_path / f"{name}.json", "x", say=said.append)
    assert [line.partition(".json ")[2] for line in said] == [
        "is not UTF-8 text; it is made again",
        "is a folder, where a file should be; it is made again",
    ]


def test_a_sidecar_without_what_an_item_s_has_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, item = BatchFiles(root=tmp_path), batch().items[0]
    write_item(files, item)
    sidecar = files.of(item).sidecar
    write_json(sidecar, json.loads(sidecar.read_text()) | {"latents": 3})
    assert not files.is_done(item, "full")
    assert capsys.readouterr().err == (
        f"{sidecar} is not the sidecar of a result: it has no latents.sha256; it is made again\n"
    )


def test_an_item_whose_note_of_failure_is_damaged_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, item = BatchFiles(root=tmp_path), batch().items[0]
    files.put_into_quarantine(item, error="m", attempts=[])
    (note,) = files.quarantine.glob("*.json")
    note.write_text("{")
    assert files.quarantined(item) is None
    assert capsys.readouterr().err.endswith("; it is made again\n")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file/a.json", "Not a directory"), (tmp_path / ("x" * 300), "File name too long")):
        with pytest.raises(UserError, match=f"cannot read .*: {why}; fix it, or give another path"):
            read_json(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "it holds no keys"),
        ('{"schema": 1}', "it has no configs"),
        ('{"schema": 1, "configs": []}', "configs is"),
        ('{"schema": 1, "items": {}, "prompts": {}, "configs": {"x": 5}}', "of the configuration x, it holds no keys"),
        (
            '{"schema": 1, "items": {}, "prompts": {}, "configs": {"x": {"method": {"name": []}}}}',
            r"of the configuration x, method\.name is",
        ),
        ('{"schema": 1, "configs": {}, "prompts": {}, "items": [1]}', "items is"),
        ('{"schema": 1, "configs": {}, "items": {}, "prompts": {"a": 1}}', "prompts is"),
    ],
)
def test_invalid_batch_file_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "batch.json").write_text(text)
    with pytest.raises(UserError, match=rf"batch\.json is not a batch's description: {why}"):
        check_folder(tmp_path, batch())


@pytest.mark.parametrize("name", ["manifest.jsonl", "batch.json", "text", "status"])
def test_foreign_files_and_folders_are_found_first(tmp_path: Path, name: str) -> None:
    files = BatchFiles(root=tmp_path)
    files.check()
    (tmp_path / name).mkdir() if "." in name else (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{tmp_path / name} is (a|not a) folder, where a batch has .*; move it away"):
        files.check()


def test_everything_that_was_asked_for_is_remembered(tmp_path: Path) -> None:
    assert requested_items(tmp_path) is None
    claim_folder(tmp_path, batch("a", seeds=(0,)))
    claim_folder(tmp_path, batch("a", "b", seeds=(1,)))
    labels = {f"{m}/{name}" for m in ("freespec", "direct") for name in ("p0000-s0", "p0000-s1", "p0001-s1")}
    assert set(requested_items(tmp_path)) == labels


def test_leftover_texts_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    files = BatchFiles(root=tmp_path)
    files.text_cache.mkdir()
    old, new = (files.text_cache / f"{name}.safetensors.1-a.part" for name in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    files.tidy(done=[], todo=[])
    assert list(files.text_cache.iterdir()) == [new]


def test_snapshots_of_older_versions_get_their_name_of_today(tmp_path: Path) -> None:
    """Of these items alone: the others are another driver's."""
    files, items = BatchFiles(root=tmp_path), batch("a", seeds=(0, 1)).items
    snapshots = [files.of(item).snapshot for item in items]
    former = [
        path.with_name(f"{item.name}.checkpoint.safetensors") for path, item in zip(snapshots, items, strict=True)
    ]
    for item, path in zip(items, former, strict=True):
        files.of(item).make_folders()
        path.write_bytes(item.item_id.encode())
    snapshots[2].write_bytes(b"newer")
    files.tidy(done=items[:1], todo=items[1:3])
    assert [path.exists() for path in former] == [False, False, False, True]
    assert [path.exists() for path in snapshots] == [False, True, True, False]
    assert (snapshots[1].read_bytes(), snapshots[2].read_bytes()) == (items[1].item_id.encode(), b"newer")


def test_quarantine_keeps_every_traceback_and_lets_go(tmp_path: Path) -> None:
    files, item = BatchFiles(root=tmp_path), batch().items[0]
    attempt = {"attempt": 1, "kind": "fault", "message": "m", "traceback": "Traceback: here", "replica": "r"}
    text = files.put_into_quarantine(item, error="m", attempts=[attempt, attempt | {"attempt": 2}])
    assert text.read_text().count("Traceback: here") == 2
    assert files.quarantined(item)["attempts"][1] == {"attempt": 2, "kind": "fault", "message": "m", "replica": "r"}
    assert files.write_manifest().rows == 1
    assert json.loads((tmp_path / "manifest.jsonl").read_text())["status"] == "quarantined"
    files.release(item)
    assert files.quarantined(item) is None
    assert list(files.quarantine.iterdir()) == []


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", ""])
def test_invalid_shards(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard must be i/n with 1 <= i <= n"):
        Shard.parse(text)


def test_every_item_is_in_exactly_one_shard_whatever_list_its_driver_has() -> None:
    """Three drivers, each with a list of its own: one has a seed more, one the prompts in another order."""
    lists = [
        batch(*texts, seeds=seeds).items
        for texts, seeds in (("abc", (0, 1)), ("abc", (0, 1, 2)), ("cab", (0, 1)))  # each letter is a prompt
    ]
    shards = [Shard.parse(f"{i}/3") for i in (1, 2, 3)]
    every = {item.item_id for items in lists for item in items}
    assert all(sum(shard.owns(item_id) for shard in shards) == 1 for item_id in every)
    common = set.intersection(*({item.item_id for item in items} for items in lists))
    made = [
        item.item_id for shard, items in zip(shards, lists, strict=True) for item in items if shard.owns(item.item_id)
    ]
    assert common <= set(made)
    assert len(made) == len(set(made))


def test_shards_are_fair_and_split_methods_too() -> None:
    """A slow method must not go to one machine alone, as with every other item of the list."""
    items = batch(*map(str, range(500)), seeds=(0,)).items
    for method in ("freespec", "direct"):
        counts = [
            sum(Shard(index=i, count=4).owns(item.item_id) for item in items if item.method == method)
            for i in (1, 2, 3, 4)
        ]
        assert sum(counts) == 500
        assert max(counts) < 1.25 * 125, counts


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


ELSEWHERE = {"pid": 12, "host": "other", "place": "elsewhere", "started": 5}


@pytest.mark.parametrize("is_alive", [True, False])
def test_driver_on_another_machine_is_detected_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool
) -> None:
    """On file systems where locks do not cross machines, with a restarted pod under another name."""
    monkeypatch.setattr("engine.files.locks._beats", lambda *_: is_alive)
    lock = lock_file(tmp_path, "shard-1-of-1")
    lock.parent.mkdir()
    lock.write_text(json.dumps(ELSEWHERE))
    said: list[str] = []
    if is_alive:
        with pytest.raises(UserError, match=r"another driver works on shard-1-of-1 of .*: process 12 on other; wait"):
            with own_shard(tmp_path, Shard(), say=said.append):
                pass
        return
    with own_shard(tmp_path, Shard(), say=said.append):
        pass
    assert said[-1] == "taking over shard-1-of-1.lock from process 12 on other, whose heartbeat has stopped"


@pytest.mark.parametrize(("ahead", "words"), [(3600, ", with a clock 3600 s ahead of this one"), (-3600, "")])
def test_a_status_of_another_machine_blocks_nothing(tmp_path: Path, ahead: float, words: str) -> None:
    (tmp_path / "status").mkdir()
    status = {"host": "other", "state": "running", "time": time.time() + ahead + 0.5, "pid": 1}
    write_json(tmp_path / "status/shard-1-of-1.json", status)
    said: list[str] = []
    with own_shard(tmp_path, Shard(), say=said.append):
        pass
    assert said == [f"taking over shard-1-of-1 from process 1 on other, which ended without cleaning up{words}"]
    (tmp_path / "status/shard-1-of-1.json").write_text("half of {")
    with own_shard(tmp_path, Shard(), say=said.append):
        pass
    assert len(said) == 1


@pytest.mark.parametrize("state", ["running", "done"])
def test_a_batch_that_died_ahead_of_this_clock_is_lost(tmp_path: Path, state: str) -> None:
    (tmp_path / "status").mkdir()
    status = {"host": "other", "state": state, "time": time.time() + 3600, "pid": 1, "seconds": 1.0, "eta": 3.0}
    write_json(tmp_path / "status/shard-1-of-1.json", status | {"counts": {"done": 1}, "replicas": [], "failures": []})
    [(_, found)] = read_status(tmp_path)
    assert found["state"] == ("lost" if state == "running" else "done")
    (tmp_path / "status/shard-2-of-2.json").write_text("{")
    _, (name, found) = read_status(tmp_path)
    assert table(name, found).startswith("shard-2-of-2: its status cannot be read (")
    (tmp_path / "status/shard-2-of-2.json").unlink()
    with own_shard(tmp_path, Shard()):
        [(_, found)] = read_status(tmp_path)
        assert found["state"] == state
