"""Which videos a batch's folder or a list has, and every way in which they are not what they should be."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.media.read_video import read_frames
from evaluation.videos import groups, read_batch, read_batches, read_list, what_is_missing
from tests.engine.media.test_read_video import LIMITED, picture, write, ycbcr
from tests.evaluation.batches import FPS, PROMPTS, SIZE, SWITCHES, make_batch, write_sidecar, write_video


def test_a_batch_is_read_from_its_sidecars(batch: Path) -> None:
    videos = read_batch(batch)
    assert [(v.method, v.prompt_id, v.seed) for v in videos] == [
        (method, prompt, seed)
        for method in ("direct", "sliding_window")
        for prompt in ("p0000", "p0001")
        for seed in (0, 7)
    ]
    first = videos[0]
    assert (first.prompt, first.num_frames, first.fps, first.size, first.model) == (
        PROMPTS[0],
        21,
        FPS,
        (SIZE, SIZE),
        "tiny/wan",
    )
    assert (first.native_frames, first.settings) == (9, ())  # the settings of freespec are not those of direct
    assert {video.pair for video in videos[:4]} == {video.pair for video in videos[4:]}


def test_settings_are_those_of_the_method_and_several_folders_are_one_evaluation(tmp_path: Path) -> None:
    roots = [tmp_path / "a", tmp_path / "b"]
    for number, root in enumerate(roots):
        make_batch(root, methods=("freespec",), seeds=(0,))
        (folder,) = root.glob("freespec/*")
        folder.rename(folder.with_name(f"{number:012x}"))
    for path in roots[1].rglob("*.json"):
        tree = json.loads(path.read_text()) | {"config_id": f"{1:012x}"}
        tree["run"]["config"]["method"]["freespec"] = SWITCHES | {"basis": "global", "steps": [1, 2]}
        path.write_text(json.dumps(tree))
    videos = read_batches(roots)
    assert [(v.config_id, dict(v.settings)["basis"]) for v in videos] == [
        ("000000000000", "local"),
        ("000000000000", "local"),
        ("000000000001", "global"),
        ("000000000001", "global"),
    ]
    assert len(set(videos)) == 4  # they are keys
    assert list(groups(videos)) == ["freespec@000000000000", "freespec@000000000001"]
    with pytest.raises(UserError, match="have the same method, prompt and seed"):
        read_batches([roots[0], roots[0]])


def test_unfinished_and_quarantined_items_are_left_out(tmp_path: Path) -> None:
    root = make_batch(tmp_path / "runs", methods=("direct",), seeds=(0,))
    video = next(root.glob("*/*/videos/p0001-s0.mp4"))
    write_sidecar(video, status="quarantined")
    video.with_name("p0002-s0.mp4.x.part").write_bytes(b"half")
    assert [found.prompt_id for found in read_batch(root)] == ["p0000"]


def test_video_that_differs_from_its_sidecar_is_left_out(tmp_path: Path) -> None:
    root = make_batch(tmp_path / "runs", methods=("direct",), seeds=(0,))
    first, second = sorted(root.glob("*/*/videos/*.mp4"))
    (root / "batch.json").write_text(
        json.dumps({"schema": 1, "items": {"direct/p0000-s0": "0", "direct/p0001-s0": "1"}})
    )

    def look(words: str) -> None:
        said: list[str] = []
        videos = read_batch(root, said.append)
        assert [video.path for video in videos] == [second]
        assert [line.partition("; ")[2] for line in said] == [
            "it is left out, and the command that made the batch makes it again"
        ]
        assert words in said[0]
        assert "1 of 2 items are made (direct 1 of 2), 0 failed for good, 1 are not" in what_is_missing(root, videos)

    shutil.copy(second, first)
    look(f"{first} is not the file that its sidecar describes; ")
    first.unlink()
    look(f"{first}, which its sidecar describes, does not exist; ")
    first.write_bytes(b"text")
    look(f"{first} is not the file that its sidecar describes; ")
    sidecar = first.with_suffix(".json")
    for content, words in (
        (json.dumps({"status": "done"}), "is not a sidecar of launch/batch.py: it has no method; "),
        ("[]", "is not a sidecar of launch/batch.py: it holds no keys; "),
        ("", "is not JSON ("),
        ("\0" * 50, "is not JSON ("),
    ):
        sidecar.write_text(content)
        look(f"{sidecar} {words}")
    second.unlink()
    with pytest.raises(UserError, match="has no finished video"):
        read_batch(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": "x"},
        {"prompt": 5},
        {"output": {"file": "/etc/passwd", "sha256": "0"}},
        {"output": []},
        {"video": [1]},
        {"run": [1]},
        {"status": None},
    ],
)
def test_a_broken_sidecar_is_named(tmp_path: Path, changes: dict, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_batch(tmp_path / "runs", methods=("direct",), seeds=(0,))
    sidecar = sorted(root.glob("*/*/videos/*.json"))[0]
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))
    assert len(read_batch(root)) == 1
    assert re.fullmatch(
        rf"{sidecar} (is not a sidecar|names the file).*; it is left out, .*\n", capsys.readouterr().err
    )


def test_what_a_batch_was_asked_for_and_has_not_is_counted(tmp_path: Path) -> None:
    root = make_batch(tmp_path / "runs", methods=("direct", "sliding_window"), seeds=(0, 7))
    labels = [f"{m}/p000{i}-s{seed}" for m in ("direct", "sliding_window") for i in (0, 1) for seed in (0, 7)]
    batch = {"schema": 1, "items": dict.fromkeys(labels, "0")}
    (root / "batch.json").write_text(json.dumps(batch))
    assert what_is_missing(root, read_batch(root)) is None
    gone = sorted(root.glob("direct/*/videos/*.mp4"))[:3]
    (root / "quarantine").mkdir()
    for path in gone:
        path.unlink()
        path.with_suffix(".json").unlink()
    failed = {"item_id": "0", "status": "quarantined", "method": "direct", "prompt_id": "p0000", "seed": 7}
    (root / "quarantine/a.json").write_text(json.dumps(failed))
    # One that was made after all, by a start that was told to try again, is no failure.
    (root / "quarantine/b.json").write_text(json.dumps(failed | {"method": "sliding_window"}))
    (root / "quarantine/c.json").write_text("{")
    assert what_is_missing(root, read_batch(root)) == (
        f"{root}: 5 of 8 items are made (direct 1 of 4, sliding_window 4 of 4), 1 failed for good, 2 are not made yet"
    )
    (root / "batch.json").unlink()
    assert what_is_missing(root, []) == f"{root}: 3 items failed for good"


def test_a_folder_without_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no finished video"):
        read_batch(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_batch(tmp_path / "nothing")


def test_a_list_gives_prompts_numbers_in_order(tmp_path: Path) -> None:
    for number in range(3):
        write_video(tmp_path / f"run_{number}.mp4", seed=number)
    rows = ["method,prompt,seed,path", "a,red,0,run_0.mp4", f"a,blue,0,{tmp_path / 'run_1.mp4'}", "b,red,0,run_2.mp4"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    videos = read_list(tmp_path / "list.csv")
    assert [(v.method, v.prompt_id, v.prompt) for v in videos] == [
        ("a", "p0000", "red"),
        ("a", "p0001", "blue"),
        ("b", "p0000", "red"),
    ]
    assert list(groups(videos)) == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,red,0,", "line 2: path is missing"),
        ("a,,0,v.mp4", "line 2: prompt is missing"),
        ("a,red,zero,v.mp4", "seed must be a whole number, got 'zero'"),
        ("a,red,--1,v.mp4", "seed must be a whole number, got '--1'"),
        ("a,red,٣,v.mp4", "seed must be a whole number, got '٣'"),
        ("a,red,0,~nobody-of-this-name/v.mp4", "line 2: cannot resolve '~nobody-of-this-name/v.mp4'"),
        ("a,red,0,nothing.mp4", "does not exist"),
        ("a,red,0,v.mp4\na,red,0,v.mp4", "have the same method, prompt and seed"),
        ("", "has no row"),
    ],
)
def test_mistakes_in_a_list(tmp_path: Path, row: str, said: str) -> None:
    write_video(tmp_path / "v.mp4")
    (tmp_path / "list.csv").write_text(f"method,prompt,seed,path\n{row}\n".rstrip("\n") + "\n")
    with pytest.raises(UserError, match=said):
        read_list(tmp_path / "list.csv")


def test_two_configurations_of_a_method_are_two_rows(tmp_path: Path) -> None:
    root = make_batch(tmp_path / "runs", methods=("direct",), seeds=(0,))
    shutil.copytree(next(root.glob("direct/*")), root / "direct" / ("f" * 12))
    for path in (root / "direct" / ("f" * 12)).rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config_id": "f" * 12}))
    assert list(groups(read_batch(root))) == ["direct@000000000000", "direct@ffffffffffff"]


def test_a_list_takes_files_of_other_tools_by_their_own_tags(tmp_path: Path) -> None:
    expected = picture()
    write(tmp_path / "a.webm", ycbcr(expected, 6, full=True), matrix=6, color_range=2)
    (tmp_path / "list.csv").write_text("method,prompt,seed,path\nother,red,0,a.webm\n")
    (video,) = read_list(tmp_path / "list.csv")
    assert (video.num_frames, video.size) == (3, expected.shape[:2])
    assert np.abs(read_frames(video.path)[:, 16, 16].astype(int) - expected[16, 16]).max() <= 4
    write(tmp_path / "b.mp4", ycbcr(expected, 9, full=False), matrix=9, color_range=LIMITED, transfer=16)
    (tmp_path / "list.csv").write_text("method,prompt,seed,path\nother,red,0,b.mp4\n")
    with pytest.raises(UserError, match=r"b\.mp4 is an HDR video"):
        read_list(tmp_path / "list.csv")
