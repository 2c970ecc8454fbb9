"""The report on rendered clips of the world, whose measures are known: tables, intervals, what is left out."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.batch.variants import Variant
from engine.config import MethodConfig, ModelConfig, RunConfig, VideoConfig
from engine.errors import UserError
from engine.files.whole import write_json
from engine.media.read_video import read_frames
from engine.media.write_video import open_video
from evaluation.comparison.measure import measure_all, units_of
from evaluation.comparison.page import write_page
from evaluation.comparison.report import write_report
from evaluation.comparison.store import Comparison, Video
from evaluation.markdown import estimate, number
from evaluation.measure import Measurer
from launch.batching.comparison import model_facts
from metrics.bootstrap import mean_interval
from metrics.course import course_metrics
from tiny.world import Scene, caption, render, sample_scene

NATIVE, FRAMES = 9, 33  # frames of a window of three latent frames, and of the videos


def scenes() -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(0)
    found: dict[str, Scene] = {}
    while len(found) < 7:
        scene = sample_scene(rng)
        if scene.motion in ("left", "up"):
            found.setdefault(caption(scene, rng), scene)
    return [(scene, text) for text, scene in found.items()]


def write_video(video: Video, clip: np.ndarray, *, seconds: float, resumed_at: int = 0) -> None:
    """A video with the part of its sidecar that a report reads."""
    video.files.video.parent.mkdir(parents=True, exist_ok=True)
    with open_video(video.files.video, fps=16, height=64, width=64, crf=4) as file:
        file.write(clip)
    mode = {"true": "global", "changed": "dual"}[video.label]
    cpu = (1.0 if mode == "global" else 0.75) * (1 + video.prompt_index)
    step = {"mode": mode, "seconds": seconds, "cpu_seconds": cpu}
    data = video.files.video.read_bytes()
    output = {"file": video.files.video.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sidecar = {"item_id": video.item.item_id, "output": output, "video": {"num_frames": len(clip)}}
    write_json(
        video.files.sidecar,
        sidecar
        | {
            "run": {
                "seconds": {"denoise": 2 * seconds, "decode": 1.0},
                "steps": [step | {"step": i, "timestep": 900.0 - i} for i in range(2)][resumed_at:],
                "resumed_at": resumed_at,
                "device": {"name": "a device", "cpu_threads": 1},
                "parallel": {"ranks": 1},
                "versions": {"torch": "2"},
                "git": None,
                "model": {
                    "path": "tiny/wan",
                    "sha256": {"vae/a.safetensors": "a" * 64, "transformer/b.safetensors": "b" * 64},
                },
            }
        },
    )


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Seven prompts, two seeds: `true` shows the captions, `changed` is another shape from frame 21 on."""
    config = RunConfig(
        model=ModelConfig(path="tiny/wan", device="cpu"),
        video=VideoConfig(num_frames=FRAMES, height=64, width=64),
        method=MethodConfig(name="direct", window_frames=3),
    )
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, name="freespec"))
    made = Comparison(
        folder=tmp_path_factory.mktemp("compared"),
        model=model_facts(config),
        variants=[Variant(label="true", config=config), Variant(label="changed", config=other)],
        prompts=[text for _, text in scenes()],
        seeds=[0, 1],
    )
    by_prompt = {text: scene for scene, text in scenes()}
    for video in made.videos:
        if (video.label, video.prompt_index, video.seed) == ("changed", 6, 1):
            continue  # one video is not made yet
        scene = by_prompt[video.prompt]
        clip = render(scene, FRAMES)
        if video.label == "changed":
            clip[21:] = render(dataclasses.replace(scene, shape="star" if scene.shape != "star" else "square"), FRAMES)[
                21:
            ]
        seconds = 3.0 if video.label == "true" else 4.0
        if video.prompt_index == video.seed == 0:
            seconds = 1000.0  # its machine slept
        write_video(video, clip, seconds=seconds, resumed_at=int(video.prompt_index == 2))
    return made


@pytest.fixture(scope="module")
def report(comparison: Comparison) -> dict[str, Any]:
    """What the report says; its files lie in the folder."""
    line = write_report(comparison, folder=comparison.folder, baseline="true", measurer=Measurer())
    assert "26 videos: 2 methods on 13 pairs of prompt and seed of 14 asked for" in line
    made = json.loads((comparison.folder / "report.json").read_text())
    assert made["pairs"] == {"made": 13, "asked": 14}
    return made


def test_the_numbers_are_those_of_the_clips(report: dict[str, Any]) -> None:
    assert report["world"] is True
    assert len(report["videos"]) == 26
    rows = {(row["label"], row["metric"]): row for row in report["summary"]}
    assert rows["true", "shape_kept"]["mean"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 7}
    changed = rows["changed", "shape_kept"]
    assert changed["mean"]["mean"] == pytest.approx((21 - NATIVE) / (FRAMES - NATIVE))
    assert changed["difference"]["mean"] == pytest.approx(-0.5)
    assert changed["differs"] is True
    assert rows["changed", "colour_kept"]["differs"] is False
    assert rows["true", "shape_kept"]["difference"] is None
    assert rows["true", "motion_as_captioned"]["mean"]["mean"] == 1.0
    assert report["clips"]["identity_kept"]["changed"][3]["mean"] == 0.0
    assert [each["mean"] for each in report["clips"]["identity_kept"]["true"]] == [1.0] * 4


def test_an_unfinished_pair_counts_for_no_method(report: dict[str, Any]) -> None:
    """A mean over prompts that only some methods have would compare prompts, not methods."""
    assert not any((each["prompt_index"], each["seed"]) == (6, 1) for each in report["videos"])
    assert {each["label"] for each in report["videos"] if each["prompt_index"] == 6} == {"true", "changed"}


def test_times_are_medians_by_kind_of_step_and_of_runs_in_one_go(report: dict[str, Any]) -> None:
    times = report["times"]
    assert times["true"] == {
        "runs": 11,
        "denoise": 6.0,
        "decode": 1.0,
        "steps": {"global": {"median": 3.0, "per_run": 2}},
        "cpu": 8.0,
        "cpu_ratio": {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 7},
    }
    assert times["changed"]["steps"] == {"dual": {"median": 4.0, "per_run": 2}}
    assert times["changed"]["cpu_ratio"] == {"mean": 0.75, "low": 0.75, "high": 0.75, "count": 7}


def test_long_measures_are_those_of_the_course(comparison: Comparison) -> None:
    """They come last, with a version of their own: kept measures without them are not taken for them."""
    video = comparison.videos[0]
    (plain,), (long,) = (
        measure_all(dataclasses.replace(comparison, long_measures=each), [video], Measurer()) for each in (False, True)
    )
    expected = course_metrics(read_frames(video.files.video), NATIVE).values
    assert list(long.values) == [*plain.values, *expected]
    assert {name: long.values[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert {name: long.values[name] for name in plain.values} == pytest.approx(plain.values, nan_ok=True)
    assert long.version != plain.version
    assert list(units_of(dataclasses.replace(comparison, long_measures=True))) == list(long.values)


def test_the_page_has_the_table_and_every_pair(comparison: Comparison, report: dict[str, Any]) -> None:
    page = (comparison.folder / "index.html").read_text()
    assert '<td class="differs">0.5 [0.5, 0.5]<br><span class="difference">−0.5 [−0.5, −0.5]</span></td>' in page
    assert page.count("-s1.mp4") == 12
    assert "3 x 2" in page


@pytest.mark.usefixtures("no_plots")
def test_a_report_on_some_methods_lies_elsewhere_and_finds_the_videos(
    comparison: Comparison, report: dict[str, Any]
) -> None:
    some = dataclasses.replace(comparison, variants=comparison.variants[:1])
    folder = comparison.folder / "reports" / "one"
    before = (comparison.folder / "report.json").read_bytes()
    line = write_report(some, folder=folder, baseline="true", measurer=Measurer())
    assert "14 videos: 1 methods" in line  # the pair that the other method lacks counts here
    assert (comparison.folder / "report.json").read_bytes() == before
    made = json.loads((folder / "report.json").read_text())
    assert all((folder / each["file"]).resolve().is_file() for each in made["videos"])
    config = comparison.batch.config_ids["true"]
    assert f'"file": "../../true/{config}/videos/p0000-s0.mp4"' in (folder / "index.html").read_text()
    assert "Difference" not in (folder / "summary.md").read_text()


def test_the_tables_in_markdown(comparison: Comparison, report: dict[str, Any]) -> None:
    text = (comparison.folder / "summary.md").read_text()
    assert text.startswith("| measure | true | changed |\n| --- | --- | --- |\n| `flow_mean` (px/frame) |")
    assert "| `shape_kept` (share of frames) | 1 [1, 1] | 0.5 [0.5, 0.5] |" in text
    assert "Difference from true, paired by prompt:" in text
    assert "| `shape_kept` (share of frames) | **−0.5 [−0.5, −0.5]** |" in text
    assert "| `colour_kept` (share of frames) | 0 [0, 0] |" in text  # holds 0: not bold
    assert estimate({"mean": 0.25, "low": None, "high": None}, signed=True) == "+0.25"
    assert estimate({"mean": 0.1, "low": -0.1, "high": 0.3}, signed=True) == "+0.1 [−0.1, +0.3]"
    assert estimate(None) == estimate({"mean": None, "low": None, "high": None}) == "–"


@pytest.mark.usefixtures("no_plots")
def test_videos_of_different_weights_are_named(comparison: Comparison) -> None:
    record = comparison.videos[0].files.sidecar
    before = record.read_text()
    other = json.loads(before)
    other["run"]["model"]["sha256"]["transformer/b.safetensors"] = "c" * 64
    folder = comparison.folder / "reports" / "mixed"

    def notes(record_text: str) -> str:
        record.write_text(record_text)
        write_report(comparison, folder=folder, baseline="true", measurer=Measurer())
        return " ".join(json.loads((folder / "report.json").read_text())["notes"])

    mixed = notes(json.dumps(other))
    assert "must not be compared: transformer/b.safetensors bbbbbbbbbbbb of 25, cccccccccccc of 1 videos" in mixed
    assert "vae/a.safetensors" not in mixed
    assert "weights" not in notes(before)
    # A checkpoint of the hub is told by its commit.
    hub = json.loads(before)
    hub["run"]["model"] = {"path": "a/b", "commit": "d" * 40, "single_file": None}
    assert "commit dddddddddddd of 1, none of 25" in notes(json.dumps(hub))
    record.write_text(before)


def test_without_a_whole_pair_there_is_no_report(comparison: Comparison) -> None:
    nothing = dataclasses.replace(comparison, seeds=[5])
    with pytest.raises(UserError, match="nothing to report"):
        write_report(nothing, folder=nothing.folder, baseline="true", measurer=Measurer())


def test_a_prompt_cannot_break_the_page() -> None:
    evil = "a </script><script>alert(1)</script> & circle"
    data = {
        "fps": 16,
        "prompts": [{"text": evil, "events": [], "seeds": [{"seed": 0, "videos": [{"label": "a", "file": "a.mp4"}]}]}],
    }
    page = write_page(title=evil, notes=[evil], videos=data, rows=[], times={}, plots=[])
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_script_of_the_page(tmp_path: Path) -> None:
    """One animation loop however often the speed is changed, and missing videos are told and left out."""
    files = ["videos/a/000 #1.mp4", "b.mp4", "c.mp4"]
    seed = {"seed": 0, "videos": [{"label": "a", "file": file} for file in files]}
    events = [{"text": "first", "start": 0, "stop": 1}, {"text": "then", "start": 1, "stop": 32}]
    data = {"fps": 16, "prompts": [{"text": "a", "events": events, "seeds": [seed]}]}
    page = tmp_path / "index.html"
    page.write_text(write_page(title="a", notes=[], videos=data, rows=[], times={}, plots=[]))
    command = ["node", str(Path(__file__).with_name("page.js")), str(page)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["sources"] == ["videos/a/000%20%231.mp4", "b.mp4", "c.mp4"]
    assert (told["time"], told["later"]) == ("0.00 s, frame 0: first", "0.09 s, frame 1: then")
    assert (told["before"], told["loops"], told["playing"]) == ("", 1, [True] * 3)
    assert told["oneMissing"].startswith(
        "1 of 3 videos cannot be played, such as videos/a/000%20%231.mp4: they are files"
    )
    assert (told["othersPlay"], told["loopsThen"]) == ([True, True], 1)
    assert told["allMissing"].startswith("3 of 3 videos cannot be played")
    assert (told["button"], told["disabled"], told["loopsAtEnd"]) == ("play all", True, 0)


def test_the_page_fits_a_telephone() -> None:
    """Nothing of the page's own is wider than the window: what may be wide scrolls in its own box, or is cut to it."""
    data = {"fps": 16, "prompts": []}
    page = write_page(title="a", notes=[], videos=data, rows=[], times={}, plots=[("plots/a b.svg", "a")])
    style = page.partition("<style>")[2].partition("</style>")[0]
    widths = re.findall(r"(?:max|min)-width: ([^;]+);", style.partition("@media")[0])
    assert sorted(widths) == ["100%", "1400px", "60em", "min(12em, 100%)", "min(40em, 100%)"]
    assert "minmax(min(190px, 45%), 1fr)" in style
    assert all(
        "overflow-x: auto" in re.findall(rf"^{name} {{.*}}$", style, re.M | re.S)[0] for name in ("table", ".plot")
    )
    assert 'src="plots/a%20b.svg"' in page


def test_kinds_of_steps_cannot_break_the_page() -> None:
    """A method names them, and records bring them."""
    steps = {"<img src=x onerror=alert(1)>": {"median": 1.0, "per_run": 1}}
    times = {"a": {"runs": 1, "denoise": 1.0, "decode": 1.0, "steps": steps}}
    page = write_page(title="a", notes=[], videos={"fps": 16, "prompts": []}, rows=[], times=times, plots=[])
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt; step, s" in page


def adopt(other: Comparison, comparison: Comparison) -> None:
    """Put the videos of a comparison in the places that another one has for the same labels, prompts and seeds."""
    made = {video.key: video for video in comparison.videos}
    for video in other.videos:
        before = made[video.key].files
        video.files.video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(before.video, video.files.video)
        sidecar = json.loads(before.sidecar.read_text()) | {"item_id": video.item.item_id}
        write_json(video.files.sidecar, sidecar)


@pytest.mark.usefixtures("no_plots")
def test_a_prompt_beyond_the_world_costs_its_own_exact_measures_alone(comparison: Comparison, tmp_path: Path) -> None:
    strange = "it's a <cat>"
    prompts = [*comparison.prompts[:2], strange]
    mixed = dataclasses.replace(comparison, folder=tmp_path, prompts=prompts, seeds=[0])
    adopt(mixed, comparison)
    folder = tmp_path / "reports" / "strange"
    write_report(mixed, folder=folder, baseline="true", measurer=Measurer())
    made = json.loads((folder / "report.json").read_text())
    rows = {(row["label"], row["metric"]): row["mean"] for row in made["summary"]}
    assert rows["true", "shape_kept"] == {"mean": 1.0, "low": None, "high": None, "count": 2}
    assert rows["true", "flow_mean"]["count"] == 3
    assert [each["values"]["shape_kept"] for each in made["videos"] if each["prompt_index"] == 2] == [None, None]
    notes = " ".join(made["notes"])
    assert 'are means over 2 of 3 prompts: this prompt is no caption of the world: "it\'s a <cat>".' in notes
    assert "it&#39;s a &lt;cat&gt;" in (folder / "index.html").read_text()


@pytest.mark.usefixtures("no_plots")
def test_why_a_measure_has_no_value(comparison: Comparison) -> None:
    """Of 33 frames, at a native length of 9, nothing is missing; at one of 33 what compares clips is."""
    config = dataclasses.replace(
        comparison.config, method=dataclasses.replace(comparison.config.method, window_frames=9)
    )
    facts, variants = model_facts(config), [Variant(label="true", config=config)]
    short = dataclasses.replace(comparison, model=facts, variants=variants, seeds=[0])
    adopt(short, comparison)
    folder = comparison.folder / "reports" / "short"
    write_report(short, folder=folder, baseline="true", measurer=Measurer())
    notes = json.loads((folder / "report.json").read_text())["notes"]
    [clips] = [note for note in notes if "clip_colour_similarity" in note]
    assert clips.startswith("No video has a value of clip_")
    assert "33 frames are one clip of native length (33); from " in clips
    assert any("measured on the frames after the native length (33), and there are 33 in all" in note for note in notes)
    write_report(comparison, folder=folder, baseline="true", measurer=Measurer())
    assert "No video has a value of clip_" not in (folder / "index.html").read_text()


def test_numbers_in_tables() -> None:
    shown = [number(x) for x in (0.12345, 12.345, 12345.6, math.nan, -5e-18, 1e-9)]
    assert shown == ["0.123", "12.3", "12346", "–", "0", "1e-09"]
    assert estimate(mean_interval(np.full(8, 2.0)), signed=True) == "+2 [+2, +2]"
    assert estimate(mean_interval(np.full(2, 2.0))) == "2"
