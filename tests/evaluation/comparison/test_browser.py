"""The page of a comparison in a real browser: two videos play in step, and nothing is wider than a telephone's window."""

from pathlib import Path

import numpy as np
import pytest

from engine.media.write_video import open_video
from evaluation.comparison.page import write_page
from evaluation.comparison.summary import Row
from metrics.bootstrap import mean_interval, paired_interval
from tests.browser import CHROMIUM, Browser

FPS, FRAMES = 16, 48
STEP = 1.5 / FPS  # the page puts back in step what is off by more

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two videos, wide tables, a long prompt and a plot."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    labels = [f"a_rather_long_label_of_a_method_{number}" for number in range(6)]
    for label in labels[:2]:
        with open_video(folder / f"{label}.mp4", fps=FPS, height=64, width=64, crf=12) as file:
            file.write(np.repeat(rng.integers(0, 256, (FRAMES, 8, 8, 3), np.uint8), 8, 1).repeat(8, 2))
    (folder / "plot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="1600" height="400"></svg>')
    values, prompt = rng.random((6, 8)), "a_prompt_without_a_space_" * 12
    rows = [
        Row(label=label, metric="m", unit="px", mean=mean_interval(of), difference=paired_interval(of, values[0]))
        for label, of in zip(labels, values, strict=True)
    ]
    steps = {f"a_long_kind_of_step_{kind}": {"median": 1.0, "per_run": 4} for kind in range(6)}
    seed = {"seed": 0, "videos": [{"label": label, "file": f"{label}.mp4"} for label in labels[:2]]}
    text = write_page(
        title=", ".join(labels),
        notes=[prompt],
        videos={"fps": FPS, "prompts": [{"text": prompt, "events": [], "seeds": [seed]}]},
        rows=rows,
        times={label: {"runs": 1, "denoise": 1.0, "decode": 1.0, "steps": steps} for label in labels},
        plots=[("plot.svg", prompt)],
    )
    (folder / "index.html").write_text(text)
    (folder / "loose.html").write_text(text.replace("video.currentTime = leader.currentTime", "void 0"))
    (folder / "wide.html").write_text(text.replace("overflow-x: auto", "overflow-x: visible"))
    return folder / "index.html"


def play(browser: Browser) -> None:
    """Start both videos, and put the second out of step once both have moved."""
    browser.wait_for("videos.length === 2 && videos.every(video => video.readyState >= 3)")
    assert browser.value("videos.map(video => video.videoWidth)") == [64, 64]
    browser.value("document.getElementById('play').click()")
    browser.wait_for("videos.every(video => !video.paused && video.currentTime > 0.1)")
    browser.value("videos[1].currentTime = videos[0].currentTime + 1.2")
    browser.wait_for("!videos[1].seeking")


def test_two_videos_play_in_step(page: Path, tmp_path: Path) -> None:
    with Browser(page, tmp_path, width=1280) as browser:
        play(browser)
        browser.wait_for(f"Math.abs(videos[0].currentTime - videos[1].currentTime) <= {STEP}")
        browser.value("document.getElementById('play').click()")
        assert browser.value("videos.map(video => video.paused)") == [True, True]
        browser.value("document.getElementById('forth').click()")
        first, second = browser.value("videos.map(video => video.currentTime)")
        assert first == second
        assert browser.value("document.getElementById('time').textContent").endswith(f"frame {int(first * FPS)}")


def test_without_the_page_s_hand_they_stay_apart(page: Path, tmp_path: Path) -> None:
    with Browser(page.with_name("loose.html"), tmp_path, width=1280) as browser:
        play(browser)
        # Ten turns of the page's own loop, in which the other test's videos are put back.
        apart = browser.value(
            "new Promise(done => { let turns = 10; const look = () => --turns ? requestAnimationFrame(look)"
            " : done(Math.abs(videos[0].currentTime - videos[1].currentTime)); look(); })"
        )
        assert apart > STEP


ROOT = "document.documentElement"
WIDER = """
[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 0.5
  && !one.parentElement.closest('table, .plot')).map(one => one.tagName + ' ' + one.getBoundingClientRect().right)
"""


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window_but_in_a_box_that_scrolls(page: Path, tmp_path: Path, width: int) -> None:
    with Browser(page, tmp_path / "a", width=width) as browser:
        assert browser.value("innerWidth") == width
        assert browser.value(WIDER) == []
        assert browser.value(f"{ROOT}.scrollWidth - {ROOT}.clientWidth") == 0
        columns = browser.value(
            "new Set([...document.querySelectorAll('figure:has(video)')].map(f => f.offsetLeft)).size"
        )
        assert columns == 2  # side by side
    with Browser(page.with_name("wide.html"), tmp_path / "b", width=width) as browser:
        assert browser.value(f"{ROOT}.scrollWidth - {ROOT}.clientWidth") > 0
