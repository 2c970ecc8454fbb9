"""Measures of continued videos: exact on clips of the world, and on clips that jump, drift or change; and one video of each way."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.extensions import (
    FPS,
    LATENT,
    LENGTH,
    NATIVE,
    SEAMS,
    TAIL,
    list_videos,
    make,
    measure,
    measured,
    observe,
)
from benchmarks.given_rules import RULES, table
from benchmarks.videos import (
    MODELS,
    make_missing,
    open_engine,
    options,
    read,
    read_kept,
    report_path,
    sampler_of,
    with_kept,
    write_report,
)
from engine.config import ModelConfig
from engine.errors import UserError
from engine.load.checkpoint import open_checkpoint
from evaluation.study.timelines_and_extensions import WAYS, WRONG, extensions
from tiny.captions import parse_caption
from tiny.world import SPEEDS, Scene, render

PROMPT = "a red circle moves right over a blue background"
MODEL = {"model": "tiny/wan", "steps": 1, "guidance": 3.0}
SAMPLER = MODEL | {"checkpoint": "b67346ca1fdc948c"}
LATER = slice(NATIVE, None)
SPEED = SPEEDS["normal"]


def show(prompt: str = PROMPT) -> np.ndarray:
    """A clip of the world, float [LENGTH, 64, 64, 3]."""
    told = parse_caption(prompt)
    assert told is not None
    words = {name: getattr(told, name) for name in ("shape", "colour", "size", "motion", "speed", "background", "pan")}
    scene = Scene(**words, start=(20.0, 32.0), angle=0.0, texture_start=(0.0, 0.0))
    return render(scene, LENGTH).astype(np.float64)


def marks(frames: np.ndarray, way: str = "extension") -> dict[str, float]:
    # Through a line of the file, as the table has them.
    return measure(json.loads(json.dumps(observe(frames))), SEAMS[way])


def test_a_video_that_goes_on_as_it_was() -> None:
    for way in SEAMS:
        found = marks(show(), way)
        assert found["kept"] == 1.0
        assert [found["centre_seam"], found["centre_inside"]] == pytest.approx([SPEED] * 2, abs=0.05)
        assert max(value for name, value in found.items() if "rgb" in name) < 1.0


def test_jump_at_the_seam_is_measured_only_there() -> None:
    frames = show()
    frames[LATER] = np.roll(frames[LATER] + 8.0, 5, axis=2)
    found, still = marks(frames), marks(show())
    assert found["centre_seam"] == pytest.approx(SPEED + 5, abs=0.05)
    assert found["background_rgb_seam"] == pytest.approx(8 * np.sqrt(3), abs=1.0)
    assert found["rgb_seam"] == pytest.approx(8 * np.sqrt(3), abs=1.0)
    inside = [name for name in found if name.endswith(("_inside", "_between", "_slope"))]
    assert [found[name] for name in inside] == pytest.approx([still[name] for name in inside], abs=0.2)


def test_steps_between_latent_frames_are_measured_separately() -> None:
    """A step of 2 px more wherever a latent frame begins is no jump at the seam against those between latent frames."""
    frames = show()
    for begin in range(1, LENGTH, LATENT):
        frames[begin:] = np.roll(frames[begin:], 2, axis=2)
    found = marks(frames)
    assert (
        found["centre_seam"] == pytest.approx(found["centre_between"], abs=0.05) == pytest.approx(SPEED + 2, abs=0.05)
    )
    assert found["centre_inside"] == pytest.approx(SPEED + 2 / LATENT, abs=0.05)


def test_every_piece_of_the_chain_has_a_seam() -> None:
    second = SEAMS["chain"][1]
    frames = show()
    frames[second:] += 8.0
    assert marks(frames, "chain")["rgb_seam"] == pytest.approx(8 * np.sqrt(3) / len(SEAMS["chain"]), abs=0.5)
    assert marks(frames)["rgb_seam"] < 0.5
    assert SEAMS["chain"][-1] + NATIVE - TAIL == LENGTH


def test_the_slope_is_the_drift_per_second() -> None:
    drift = 0.25  # levels per frame and channel: 24 in all
    frames = show("a blue circle moves right over a gray background")
    frames[LATER] += drift * np.arange(LENGTH - NATIVE)[:, None, None, None]
    found = marks(frames)
    # the blue channel ends at 255, so the subject drifts less than the background
    assert found["background_rgb_slope"] == pytest.approx(drift * FPS * np.sqrt(3), rel=0.05)
    assert drift * FPS < found["rgb_slope"] < found["background_rgb_slope"]
    assert marks(show())["background_rgb_slope"] < 0.2


@pytest.mark.parametrize("other", ["star", "green circle", "gray background"])
def test_another_shape_colour_or_background_is_not_kept(other: str) -> None:
    word = {"star": "circle", "green circle": "red circle", "gray background": "blue background"}[other]
    frames, half = show(), NATIVE + (LENGTH - NATIVE) // 2
    frames[half:] = show(PROMPT.replace(word, other))[half:]
    assert marks(frames)["kept"] == 0.5


def test_frames_without_an_object_are_not_kept_and_have_no_place() -> None:
    frames = show()
    frames[NATIVE : NATIVE + 24] = np.array([44, 62, 104])
    found = marks(frames)
    assert found["kept"] == 0.75
    assert np.isnan(found["centre_seam"])
    assert found["centre_inside"] == pytest.approx(SPEED, abs=0.05)


def test_the_page_is_of_prompts_with_both_ways_and_says_what_is_met(tmp_path: Path) -> None:
    still, drifting = show(), show()
    drifting[LATER] += 0.2 * np.arange(LENGTH - NATIVE)[:, None, None, None]
    seen = {"extension": observe(still), "chain": observe(drifting)}
    prompts = [PROMPT, "a red circle moves right fast over a blue background", PROMPT]
    videos = [{"seed": 0, "index": index, "prompt": prompt} for index, prompt in enumerate(prompts)]
    lines = [video | {"way": way, "seen": seen[way]} for video in videos for way in SEAMS]
    del lines[-2]  # of the last one only the chain is there

    def page(lines: list[dict]) -> str:
        return extensions(write_report(tmp_path / "report.json", measured(lines), [LENGTH], SAMPLER))

    text = page(lines)
    assert "2 clips of held-out prompts" in text
    assert [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| straight")] == [
        ["| straight, fast", "1"],
        ["| straight, normal", "1"],
    ]
    assert [line.split(" | ")[-1] for line in text.splitlines() if "half of the chain" in line] == ["met |"] * 2
    turned = [line | {"way": {"extension": "chain", "chain": "extension"}[line["way"]]} for line in lines]
    assert [line.split(" | ")[-1] for line in page(turned).splitlines() if "half of the" in line] == [
        "**missed** |"
    ] * 2


def test_goals_of_another_model_stand_beside_those_of_the_first(tmp_path: Path) -> None:
    """Of the other one it is the extension that drifts, not the chain, and it has one more clip."""
    drifting = show()
    drifting[LATER] += 0.2 * np.arange(LENGTH - NATIVE)[:, None, None, None]
    reports = []
    still, drift = observe(show()), observe(drifting)
    for model, ours, chain, count in (("tiny/wan", still, drift, 1), ("tiny/ltx", drift, still, 2)):
        seen = {"extension": ours, "chain": chain}
        videos = [{"seed": 0, "index": index, "prompt": PROMPT} for index in range(count)]
        lines = [video | {"way": way, "seen": seen[way]} for video in videos for way in SEAMS]
        reports.append(write_report(tmp_path / "a.json", measured(lines), [LENGTH], SAMPLER | {"model": model}))
    first, other = reports
    text = extensions(first, other)
    assert "| goal | tiny/wan: difference | met | tiny/ltx: difference | met |" in text
    slope = next(line for line in text.splitlines() if line.startswith("| slope of the background's colour"))
    assert [slope.split(" | ")[column] for column in (2, 4)] == ["met", "**missed** |"]
    assert "`tiny/ltx` was trained to continue clips; 2 clips, 1 steps" in text
    assert "by `--model tiny/ltx --report docs/findings/extensions-ltx/report.json`." in text
    assert "1 clips of held-out prompts" in text and "extensions --count 1 --seeds 1" in text
    assert "| goal | difference | met |" in extensions(first) == extensions(first, other | {"videos": []})
    assert "benchmarks.extensions --model tiny/ltx --count 2" in extensions(other)


@pytest.mark.parametrize("model", MODELS)
def test_videos_begin_with_the_clip(model: str) -> None:
    """LTX-Video's decoder sees later frames too, of an extension other ones."""
    length = SEAMS["chain"][1]
    with open_engine(**MODEL | {"model": model, "steps": {"tiny/wan": 1, "tiny/ltx": 2}[model]}) as engine:
        clip = engine.generate(PROMPT, num_frames=NATIVE, seed=3).frames
        extension, chain = (make(engine, PROMPT, way, 3, length=length) for way in SEAMS)
    assert extension.shape == chain.shape == (length, 64, 64, 3)
    np.testing.assert_array_equal(chain[:NATIVE], clip)
    most = {"tiny/wan": 0, "tiny/ltx": 8}[model]
    assert np.abs(extension[:NATIVE].astype(int) - clip).mean() <= most
    assert np.abs(extension[LATER].astype(int) - chain[LATER]).mean() > most


def test_a_video_is_made_once(tmp_path: Path) -> None:
    out, videos, made = tmp_path / "extensions.jsonl", list(list_videos(1, 1, way=WAYS)), []
    out.write_text(
        "".join(
            json.dumps(videos[1] | line) + "\n"
            for line in (MODEL, SAMPLER | {"checkpoint": "a"}, SAMPLER | {"steps": 2})
        )
        + json.dumps(videos[0] | SAMPLER | {"seen": {}})
        + "\n"
    )
    make_missing(out, SAMPLER, videos, lambda _engine, video: made.append(video) or {"seen": {"shape": ["star"]}})
    assert [video["way"] for video in made] == ["chain"]  # other lines of it name no weights, others, or other steps
    assert read(out)[4:] == [videos[1] | SAMPLER | {"seen": {"shape": ["star"]}}]


def test_lines_and_reports_of_two_models_are_kept_apart() -> None:
    parser = options(None, name="extensions", count="extensions", seeds=1, models=MODELS)
    first, other = (parser.parse_args([f"--model={model}"]) for model in MODELS)
    assert (first.out, sampler_of(first)["model"]) == (other.out, MODELS[0])
    assert [report_path(args).name for args in (first, other)] == ["extensions.json", "extensions-ltx.json"]
    assert report_path(parser.parse_args(["--report=a.json"])) == Path("a.json")
    digests = [open_checkpoint(ModelConfig(path=model)).digest for model in MODELS]
    for args, digest in zip((first, other), digests, strict=True):
        assert len(sampler_of(args)["checkpoint"]) == 16
        assert digest.startswith(sampler_of(args)["checkpoint"])


def test_a_kept_report_is_continued(tmp_path: Path) -> None:
    first, second = ({"seed": 0, "index": 0, "way": way, "kind": "straight, fast"} for way in ("extension", "chain"))
    kept_file, made = tmp_path / "kept.json", []
    write_report(kept_file, [first | {"values": {"kept": 1.0, "centre_seam": float("nan")}}], [LENGTH], SAMPLER)
    kept = read_kept(kept_file, SAMPLER)
    make_missing(
        tmp_path / "a.jsonl",
        SAMPLER,
        list_videos(1, 1, way=WAYS),
        lambda _engine, video: made.append(video) or {},
        kept,
    )
    assert [video["way"] for video in made] == ["chain"]
    both = with_kept([second | {"values": {"kept": 0.5}}], kept)
    assert {video["way"]: video["values"]["kept"] for video in both} == {"extension": 1.0, "chain": 0.5}
    again = with_kept([first | {"values": {"kept": 0.75}}], kept)
    assert [video["values"]["kept"] for video in again] == [0.75]
    with pytest.raises(UserError, match=r"was made with .*'sampler.num_steps': 1.* and this run has .*: 2"):
        read_kept(kept_file, SAMPLER | {"steps": 2})
    with pytest.raises(UserError, match=r"was made with .*'checkpoint': 'b67346ca1fdc948c'.* and this run has .*'abc'"):
        read_kept(kept_file, SAMPLER | {"checkpoint": "abc"})


def test_a_clip_that_is_not_as_captioned_is_of_its_own_kind() -> None:
    wrong = show()
    wrong[NATIVE - 1] = show(PROMPT.replace("red", "green"))[NATIVE - 1]
    later = show()
    later[NATIVE] = show(PROMPT.replace("red", "green"))[NATIVE]
    video = {"seed": 0, "index": 0, "prompt": PROMPT, "way": "extension"}
    lines = [video | {"seen": observe(frames)} for frames in (wrong, later)]
    assert [each["kind"] for each in measured(lines)] == [WRONG, "straight, normal"]


def test_the_table_of_rules_compares_with_the_one_in_use() -> None:
    """Of six clips one rule jumps by 5 px more at the seam."""
    frames = show()
    frames[LATER] = np.roll(frames[LATER], 5, axis=2)
    seen = {0.3: observe(show()), 1.0: observe(frames)}
    lines = [
        {"seed": 0, "index": index, "max_noise": rule, "seen": seen.get(rule, seen[0.3])}
        for index in range(6)
        for rule in RULES
    ]
    rows = [line.split(" | ") for line in table(lines).splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| {rule:g}" for rule in RULES]
    moved = dict(zip(RULES, (row[-2] for row in rows), strict=True))
    assert moved[0.3] == "" and moved[0.0] == "0 [0, 0]"
    assert moved[1.0].startswith("+5") or moved[1.0].startswith("+4.9")
