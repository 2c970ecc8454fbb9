"""compare.py end to end on a small model: its files and measures, going on after an interruption, mistakes."""

import csv
import json
import re
import signal
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.batch.locks import Shard, own_shard
from engine.decode.decoder import VideoDecoder
from engine.engine import LongVideoEngine
from engine.media.read_video import read_video
from metrics.video import VIDEO_UNITS, video_metrics
from tests.launch.conftest import SMALL, Run
from tests.launch.forked import run_forked
from tests.launch.test_interruptions import interrupted_at_forward
from tests.tiny_pipelines import save_random_ltx

Compare = Callable[..., Run]
# 17 frames, native 9: two clips of which the second is short by one.
SETTINGS = SMALL | {"sampler.num_steps": 2, "method.freespec.domain": "step"}  # so that one step fuses and one does not


def words(wan_folder: Path, out: Path, *argv: object, **settings: object) -> list[str]:
    chosen = {"model.path": wan_folder, "methods": "direct,freespec", "seeds": "0,1", "out": out} | SETTINGS | settings
    return [*(f"--{key}={value}" for key, value in chosen.items()), *map(str, argv)]


def video_of(out: Path, label: str, *, index: int = 0, seed: int = 0) -> Path:
    """The video of a prompt and seed in a folder, which holds it."""
    (found,) = out.glob(f"{label}/*/videos/p{index:04d}-s{seed}.mp4")
    return found


@pytest.fixture
def compare_with_plots(run: Callable[..., Run], wan_folder: Path, tmp_path: Path) -> Compare:
    def call(*argv: object, out: str = "out", **settings: object) -> Run:
        prompt = [] if any("--prompt" in str(word) for word in argv) else ["--prompt", "a red circle"]
        return run("compare", *words(wan_folder, tmp_path / out, *prompt, *argv, **settings))

    return call


@pytest.fixture
def compare_in(compare_with_plots: Compare, no_plots: None) -> Compare:
    return compare_with_plots


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads the model fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("engine.engine.load_pipeline", refuse)


class References(HTMLParser):
    """What a page refers to: src, href, and the files in its data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href", "poster", "data") and value]
        self._in_data = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        self.data += data if self._in_data else ""


def test_noise_of_the_decoder_comes_from_each_video_s_seed(run: Callable[..., Run], tmp_path: Path) -> None:
    """An autoencoder of LTX-Video 0.9.5 draws noise: the second seed's video is the one that generate.py makes with that seed."""
    folder = save_random_ltx(tmp_path / "ltx", conditioned=True)
    given = {"sampler.max_text_tokens": 16, "methods": "direct"}
    shown = run("compare", *words(folder, tmp_path / "out", "--prompt", "a red circle", **given))
    assert (shown.code, shown.err) == (0, "")
    chosen = {"model.path": folder, "output.path": tmp_path / "a.mp4", **SETTINGS, "sampler.max_text_tokens": 16}
    chosen |= {"method.name": "direct", "sampler.seed": 1}
    shown = run("generate", "--prompt", "a red circle", *(f"--{key}={value}" for key, value in chosen.items()))
    assert (shown.code, shown.err) == (0, "")
    videos = sorted((tmp_path / "out").rglob("*.mp4"))
    assert [path.read_bytes() == (tmp_path / "a.mp4").read_bytes() for path in videos] == [False, True]


def test_an_interrupted_comparison_goes_on_and_reports_what_it_measured(
    compare_with_plots: Compare, make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    # Two steps of two forwards a video: in the first step of the second video's second half.
    with interrupted_at_forward(7):
        stopped = compare_with_plots()
    assert stopped.code == 130
    assert stopped.out.startswith("1 of 4")
    assert "after step 1, which is kept" in stopped.err
    assert "the same command continues from there" in stopped.err
    assert not (out / "index.html").exists()

    loads = []
    load = LongVideoEngine.__init__
    monkeypatch.setattr(LongVideoEngine, "__init__", lambda self, *args: (loads.append(1), load(self, *args))[1])
    shown = compare_with_plots()
    assert (shown.code, shown.err) == (0, "")
    assert len(loads) == 1
    lines = shown.out.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == ["1 of 3", "2 of 3", "3 of 3"]
    assert "(continued after step 1)" in lines[0]
    assert lines[3].startswith(f"{out / 'index.html'}: 4 videos: 2 methods on 2 pairs of prompt and seed, 1 prompts")

    # The noise of a seed is the same for every method, and that of generate.py.
    assert make({"sampler.num_steps": 2, "method.name": "direct", "sampler.seed": 1}).code == 0
    assert video_of(out, "direct", seed=1).read_bytes() == (tmp_path / "a.mp4").read_bytes()

    check_report(out)
    check_page(out)


def check_report(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["world"] is False
    assert any("do not apply: frames of the world are 64 x 64 pixels, these are 32 x 32" in n for n in report["notes"])
    assert len(report["videos"]) == 4
    for video in report["videos"]:
        frames = np.stack(list(read_video(out / video["file"])))
        fresh = video_metrics(frames, 9)
        assert video["values"] == pytest.approx(fresh.values, abs=1e-12)
        assert len(video["by_clip"]["clip_colour_similarity"]) == 1
    with (out / "videos.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["seed"]) for row in rows] == [(x["label"], str(x["seed"])) for x in report["videos"]]
    with (out / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert {(row["label"], row["metric"]) for row in summary} == {
        (m, v) for m in ("direct", "freespec") for v in VIDEO_UNITS
    }
    flow = {(x["label"], x["seed"]): x["values"]["flow_mean"] for x in report["videos"]}
    mean = {label: (flow[label, 0] + flow[label, 1]) / 2 for label in ("direct", "freespec")}
    row = next(row for row in summary if (row["label"], row["metric"]) == ("freespec", "flow_mean"))
    assert float(row["mean"]) == pytest.approx(mean["freespec"])
    assert float(row["difference_mean"]) == pytest.approx(mean["freespec"] - mean["direct"])
    # One prompt is one independent number: no interval, whatever the number of seeds.
    assert (row["count"], row["low"], row["differs"]) == ("1", "", "False")
    assert set(report["times"]["direct"]["steps"]) == {"global"}
    assert "dual" in report["times"]["freespec"]["steps"]
    assert report["times"]["direct"]["runs"] == 2
    assert report["times"]["freespec"]["runs"] == 1  # the other one was interrupted


def check_page(out: Path) -> None:
    text = (out / "index.html").read_text()
    page = References(text)
    data = json.loads(page.data)
    files = [video["file"] for prompt in data["prompts"] for seed in prompt["seeds"] for video in seed["videos"]]
    assert len(files) == 4
    plots = {path.relative_to(out).as_posix() for path in (out / "plots").glob("*.png")}
    assert {"plots/metrics.png", "plots/times.png", "plots/clips.png"} == plots == set(page.found)
    for name in (*page.found, *files):
        assert not re.match(r"\w+:|/", name), name
        assert (out / name).is_file(), name
    assert not re.search(r"""\w://|["'(]//|@import|fetch\(|XMLHttp""", text)
    assert all((out / name).with_suffix(".svg").is_file() for name in plots)


def test_existing_videos_are_kept_and_the_lists_may_grow(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert compare_in(seeds=0, methods="sliding_window").code == 0
    video = video_of(out, "sliding_window")
    before = video.stat().st_mtime_ns
    measured = []
    monkeypatch.setattr(
        "evaluation.comparison.measure.video_metrics", lambda *args: (measured.append(1), video_metrics(*args))[1]
    )
    # Another method and prompt beside the first.
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    more = {"seeds": 0, "methods": "sliding_window,direct", "prompts": tmp_path / "prompts.txt"}
    shown = compare_in("--prompts", tmp_path / "prompts.txt", **more)
    assert shown.code == 0
    assert shown.out.startswith("1 of 3, ")
    assert video.stat().st_mtime_ns == before
    assert len(measured) == 3

    # And all of it again: no model, no measure.
    monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    assert compare_in("--prompts", tmp_path / "prompts.txt", **more).code == 0
    assert len(measured) == 3

    # A narrower command does not make the folder forget what it holds.
    assert compare_in(seeds=0, methods="sliding_window").code == 0
    (tmp_path / "others.txt").write_text("a red circle\na green star\n")
    others = compare_in("--prompts", tmp_path / "others.txt", seeds=0, methods="sliding_window")
    assert "another prompt p0001 (line 2 of the prompts is 'a green star', before it was 'a blue star')" in others.error

    # A file that was changed afterwards is not measured as if it were the one made.
    whole = video.read_bytes()
    video.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    error = compare_in("--prompts", tmp_path / "prompts.txt", **more).error
    assert "is not the file that its sidecar describes; delete both" in error
    video.write_bytes(whole)

    changed = compare_in(**{"sampler.num_steps": 3, "video.fps": 8}, seeds=0, methods="direct")
    assert "holds direct videos of another configuration; changed: sampler.num_steps 2 -> 3, video.fps 16 -> 8" in (
        changed.error
    )
    assert "choose another folder" in changed.error
    other = compare_in("--prompt", "a blue star", seeds=0)
    assert "another prompt p0000 (line 1 of the prompts is 'a blue star', before it was 'a red circle')" in other.error
    # What a method does not read is nothing of its videos.
    assert compare_in(**{"method.freespec.alpha": 2}, seeds=0, methods="direct").code == 0


def test_a_folder_of_an_older_version_is_refused_in_a_line(
    compare_in: Compare, no_loading: None, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/comparison.json").write_text("{}")
    assert "comparison.json is of an older version, which kept its videos elsewhere" in compare_in().error


@pytest.mark.parametrize("every", [0, 5])
def test_while_decoding_the_steps_are_kept_and_not_made_again(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    whole, given = VideoDecoder.decode, {"seeds": 0, "methods": "direct", "output.snapshot_every": every}

    def stop_midway(self: VideoDecoder, latents: object, *, seed: int) -> Iterator[np.ndarray]:
        for i, frames in enumerate(whole(self, latents, seed=seed)):
            yield frames
            if i == 2:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(VideoDecoder, "decode", stop_midway)
        stopped = compare_in(**given)
    assert stopped.code == 130
    assert "after step 2, which is kept in" in stopped.stopped
    assert "the same command continues from there" in stopped.stopped
    shown = compare_in(**given)
    assert shown.code == 0
    assert "(continued after step 2)" in shown.out
    found = video_of(tmp_path / "out", "direct")
    files = {path.relative_to(found.parents[1]).as_posix() for path in found.parents[1].rglob("*") if path.is_file()}
    assert files == {"videos/p0000-s0.mp4", "videos/p0000-s0.json", "videos/p0000-s0.png", "measures/p0000-s0.json"}


def test_shards_make_every_video_once_and_the_report_is_of_all(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = {"methods": "direct,sliding_window", "seeds": "0,1,2"}
    made: set[Path] = set()
    for index in (1, 2):
        shown = compare_in("--shard", f"{index}/2", workers=index, **given)
        assert (shown.code, shown.err) == (0, "")
        new = set(out.rglob("*.mp4")) - made
        assert f"{out}: shard-{index}-of-2 is made and measured, {len(new)} videos" in shown.out
        made |= new
        assert not (out / "index.html").exists()
    items = json.loads((out / "batch.json").read_text())["items"]
    assert {video_of(out, method, seed=seed) for method in ("direct", "sliding_window") for seed in range(3)} == made
    assert len(items) == 6
    assert "leave --shard out" in compare_in("--shard", "1/2", "--report_only", **given).error
    monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("evaluation.comparison.measure.video_metrics", lambda *_: pytest.fail("measured again"))
    shown = compare_in("--report_only", **given)
    assert shown.out.startswith(f"{out / 'index.html'}: 6 videos: 2 methods on 3 pairs")


def test_what_a_failing_disk_has_damaged_is_made_again_alone(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar, measures, and the state of a video that was cut off."""
    out = tmp_path / "out"
    assert compare_in().code == 0
    order = [(label, seed) for seed in (0, 1) for label in ("direct", "freespec")]
    records = [video_of(out, label, seed=seed).with_suffix(".json") for label, seed in order]
    expected = {path: path.with_suffix(".mp4").read_bytes() for path in records}
    times = {path: path.stat().st_mtime_ns for path in records}
    records[0].write_bytes(records[0].read_bytes()[:100])
    records[1].unlink()
    unfinished = records[1].parents[1] / "unfinished" / "p0000-s0.checkpoint.safetensors"  # as older versions called it
    unfinished.write_text("half")
    (records[2].parents[1] / "measures" / "p0000-s1.json").write_text("[]")
    shown = compare_in()
    assert shown.code == 0
    assert [line.partition(".")[0] for line in shown.out.splitlines()[:2]] == [
        f"{n} of 2, {path.with_suffix('')}" for n, path in enumerate(records[:2], start=1)
    ]
    lines = shown.err.splitlines()
    assert all(line.endswith("; it is made again") for line in lines)
    assert [Path(line.partition(" ")[0]).relative_to(out).parts[2] for line in lines] == [
        "videos",
        "unfinished",
        "measures",
    ]
    assert {path: path.with_suffix(".mp4").read_bytes() for path in records} == expected
    assert [records[i].stat().st_mtime_ns == times[records[i]] for i in (2, 3)] == [True, True]
    assert not list(out.rglob("*.safetensors"))


def test_sidecars_without_what_a_report_reads_are_made_again(compare_in: Compare, tmp_path: Path) -> None:
    read = ("video", "seconds", "steps", "git", "versions")
    given = {"seeds": "0,1,2,3,4", "methods": "direct", "measures": tmp_path / "kept.jsonl", "sampler.num_steps": 1}
    assert compare_in(**given).code == 0
    (tmp_path / "kept.jsonl").unlink()
    sidecars = [video_of(tmp_path / "out", "direct", seed=seed).with_suffix(".json") for seed in range(len(read))]
    whole = [json.loads(sidecar.read_text()) for sidecar in sidecars]
    for name, sidecar in zip(read, sidecars, strict=True):
        damaged = json.loads(sidecar.read_text())
        (damaged if name == "video" else damaged["run"])[name] = ["x"]
        sidecar.write_text(json.dumps(damaged))
    shown = compare_in(**given)
    assert shown.code == 0
    for sidecar, line in zip(sidecars, shown.err.splitlines(), strict=True):
        assert line.startswith(f"{sidecar} is not the sidecar of a result: ")
        assert line.endswith("; it is made again")
    assert [json.loads(sidecar.read_text())["output"] for sidecar in sidecars] == [each["output"] for each in whole]


def test_a_label_that_is_too_long_for_a_name_is_one_line(compare_in: Compare, no_loading: None) -> None:
    error = compare_in(methods=f"{'x' * 300}=direct,freespec").error
    assert "File name too long" in error


def test_a_disk_without_room_is_found_before_the_model_is_loaded(
    compare_in: Compare, no_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert " are needed for the items in progress; " in compare_in().error


def test_one_process_works_on_a_shard(compare_in: Compare, no_loading: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with own_shard(out, Shard()):
        assert "another driver works on shard-1-of-1" in compare_in().error
        assert "all drivers of a folder need the same n" in compare_in("--shard", "1/2").error
    with own_shard(out, Shard(index=1, count=2)):
        assert "another driver works on shard-1-of-2" in compare_in("--shard", "1/2").error
    assert "--shard must be i/n with 1 <= i <= n" in compare_in("--shard", "3/2").error


def test_a_report_alone_does_not_tell_of_settings_that_made_no_video(
    compare_in: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare_in(seeds=0, methods="direct").code == 0
    assert not any("native window" in note for note in json.loads((tmp_path / "out/report.json").read_text())["notes"])
    refused = compare_in("--report_only", seeds=0, methods="direct", **{"sampler.num_steps": 3})
    assert "sampler.num_steps 2 -> 3" in refused.error
    other = {"seeds": 0, "methods": "direct", "report": tmp_path / "elsewhere"}
    before = (tmp_path / "out/index.html").stat().st_mtime_ns
    assert compare_in("--report_only", **other).out.startswith(f"{tmp_path / 'elsewhere/index.html'}: 1 videos")
    assert (tmp_path / "out/index.html").stat().st_mtime_ns == before


def test_a_report_at_native_length_says_that_no_method_acts(compare_in: Compare, tmp_path: Path) -> None:
    assert compare_in(seeds=0, **{"video.num_frames": 9}).code == 0
    notes = json.loads((tmp_path / "out/report.json").read_text())["notes"]
    assert any(note.startswith("No video is longer than the native window, where every method") for note in notes)
    direct, freespec = (  # pixels, as each file names its method
        list(read_video(video_of(tmp_path / "out", name))) for name in ("direct", "freespec")
    )
    assert np.array_equal(direct, freespec)


def test_two_ranks_make_what_is_missing_and_one_reports(compare_in: Compare, wan_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    argv = words(wan_folder, tmp_path / "ranks" / "out", "--prompt", "a red circle", seeds=0)
    ended = run_forked([argv, argv], tmp_path, script="compare")
    assert [rank.code for rank in ended] == [0, 0], ended
    assert ended[1].out == ""
    assert ended[0].out.splitlines()[-1].startswith(f"{tmp_path / 'ranks/out/index.html'}: 2 videos")
    assert compare_in(seeds=0).code == 0
    for method in ("direct", "freespec"):
        one, two = (
            np.stack(list(read_video(video_of(folder / "out", method)))).astype(int)
            for folder in (tmp_path, tmp_path / "ranks")
        )
        assert np.abs(one - two).max() <= 8  # the same frames but for a rounding that the encoder may spread
        assert np.abs(one - two).mean() < 0.1


@pytest.mark.usefixtures("warm_ranks")
def test_replicas_make_the_same_videos_and_one_process_reports(
    compare_in: Compare, run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compare_in(seeds=0).code == 0
    other = tmp_path / "other"
    shown = compare_in("--replicas", "2", seeds=0, out="other")
    assert (shown.code, shown.err) == (0, ""), shown
    assert "2 of 2 items done (2 now), 0 in quarantine" in shown.out
    assert shown.out.splitlines()[-1].startswith(f"{other / 'index.html'}: 2 videos: 2 methods on 1 pairs")
    for label in ("direct", "freespec"):
        mine, theirs = (video_of(folder, label) for folder in (tmp_path / "out", other))
        assert mine.read_bytes() == theirs.read_bytes()
        assert mine.with_suffix(".png").read_bytes() == theirs.with_suffix(".png").read_bytes()
    assert "shard-1-of-1: done; 2 items" in run("batch", f"--status={other}").out
    # What replicas have made is not made again by this process, nor the other way round.
    monkeypatch.setattr("engine.engine.load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    assert compare_in(seeds=0, out="other").code == 0
    monkeypatch.setattr("launch.batching.comparison.make", lambda *_: pytest.fail("replicas were started"))
    assert compare_in("--replicas", "2", seeds=0).code == 0
    assert "--replicas must be 1 or more, got 0" in compare_in("--replicas", "0").error


def test_reports_alone_are_on_what_is_there(compare_in: Compare, no_loading: None) -> None:
    assert "has no prompt and seed with a video of every method yet" in compare_in("--report_only").error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "direct,freespac"}, "did you mean 'freespec'?"),
        ({"methods": " , "}, "--methods is empty"),
        ({"methods": "direct,direct"}, "two variants have the label direct"),
        ({"methods": "direct,again=direct"}, "direct and again have the same settings"),
        ({"methods": "direct,a/b=freespec"}, "'a/b' cannot name a folder"),
        ({"methods": "configs/tiny-wan.yaml"}, "write METHOD:configs/tiny-wan.yaml"),
        ({"methods": "direct:configs/tiny-wan.yaml"}, "is a preset of freespec, not of direct"),
        ({"methods": "freespec:none.yaml"}, "--config none.yaml does not exist"),
        ({"baseline": "freelong"}, "--baseline freelong is not one of --methods: direct, freespec"),
        ({"seeds": "-1"}, "--seeds: a seed must lie in [0, 2**63), got -1"),
        ({"seeds": 2**63}, "--seeds: a seed must lie in [0, 2**63), got 9223372036854775808"),
        ({"num_seeds": 2}, "--num_seeds is the former name of --seeds; give --seeds alone"),
        ({"report": "/dev/null/x"}, "cannot write"),
        (
            {"output.path": "a.mp4", "output.overwrite": "true"},
            "output.path, output.overwrite are not used by compare.py",
        ),
        ({"output.save_latents": "a.safetensors"}, "output.save_latents is not used by compare.py"),
        ({"method.name": "direct"}, "leave --method.name out"),
        ({"video.num_frames": 18}, "must be 4k + 1"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(
    compare_in: Compare, no_loading: None, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    assert message in compare_in(**settings).error
    assert not list(tmp_path.rglob("*.mp4"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"video.num_frames": 18}, "must be 4k + 1"),
        ({"sampler.shift": "actual"}, "sampler.shift actual has no effect"),
    ],
)
def test_settings_that_are_refused_do_not_take_the_folder(
    compare_in: Compare, no_loading: None, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    """Else the same --out with the right ones would be refused as well."""
    assert message in compare_in(**settings).error
    assert not list(tmp_path.rglob("batch.json"))


def test_the_last_seed_that_there_is_may_be_used(compare_in: Compare) -> None:
    assert "nothing to report" in compare_in("--report_only", **{"sampler.seed": 2**63 - 2}).error


def test_a_prompt_counts_once(compare_in: Compare, no_loading: None, tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("a red circle\na red circle\n")
    assert "would count as two" in compare_in("--prompts", tmp_path / "twice.txt").error
    (tmp_path / "two.txt").write_text("a red circle\na blue star\n")
    error = compare_in("--prompts", tmp_path / "two.txt", num_prompts=3).error
    assert "--num_prompts must lie in [1, 2], the number of prompts, got 3" in error
