"""The page of serve.py in a real browser: videos are made, watched, played, cancelled and compared; timelines are edited; each with a
page in which that is broken.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.launch.test_serve import save_factors, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HOSTILE = "<img src=x onerror=window.hacked=1> <b>bold</b> & \"'"
TIMELINE = "a red circle [0-0.5s] | a blue star [0.5s-]"
ROOT = "document.documentElement"


@dataclass(frozen=True)
class Service:
    """A running service, and where the profiles of browsers go."""

    address: str
    folder: Path

    @contextlib.contextmanager
    def opened(self, *, width: int = 1280, broken: str = "") -> Iterator[Browser]:
        """The page, after a script that breaks a part of it."""
        profile = self.folder / f"profile-{len(list(self.folder.glob('profile-*')))}"
        with Browser(f"{self.address}/", profile, width=width) as browser:
            browser.wait_for("document.getElementById('model').textContent && turn > 0")
            browser.value(f"void ({broken or 0})")
            yield browser


@pytest.fixture(scope="module")
def service(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("page")
    settings = {
        "preview_every": 1,
        "preview_factors": save_factors(folder),
        "sampler.num_steps": 150,
        "sampler.max_text_tokens": 128,
    }
    with started(wan_folder, folder / "out", folder / "printed", **settings) as (_, client):
        yield Service(address=str(client.base_url).removesuffix("/v1/"), folder=folder)


def make(browser: Browser, prompt: str, seed: int, steps: str = "") -> str:
    """Fill in the form and send it; returns a selector of the video's card."""
    browser.value(
        f"$('text').value = {prompt!r}; readText(); $('method').value = 'direct'; $('seed').value = {seed}; $('steps').value = '{steps}'"
    )
    browser.click("#form button.main")
    found = f"[...cards.values()].find(card => card.video.prompt === $('text').value && card.video.seed === {seed})"
    browser.wait_for(f"{found} || $('said').className === 'wrong'")
    assert browser.value("$('said').className") == "", browser.value("$('said').textContent")
    return f"li[data-id={browser.value(f'{found}.video.id')}]"


def test_a_video_is_made_watched_played_and_compared(service: Service) -> None:
    """With a reload while it is made; the words of its prompt stay words."""
    with service.opened() as browser:
        card = make(browser, HOSTILE, 0)
        browser.wait_for(f"document.querySelector('{card} img')?.naturalWidth === 16")
        browser.call("Page.reload")
        browser.wait_for(f"document.querySelector('{card} img, {card} video')")
        assert browser.value("$('text').value") == HOSTILE  # the draft is kept
        browser.wait_for(f"document.querySelector('{card} video')?.readyState >= 2")
        assert browser.value(f"document.querySelector('{card} p.words').textContent") == HOSTILE
        assert browser.value("[window.hacked, document.querySelectorAll('#gallery b, #gallery p img').length]") == [
            None,
            0,
        ]
        browser.value(f"document.querySelector('{card} video').play()")
        browser.wait_for(f"document.querySelector('{card} video').currentTime > 0.1")

        other = make(browser, HOSTILE, 1, "4")
        browser.wait_for(f"document.querySelector('{other} video')?.readyState >= 2")
        for each in (card, other):
            browser.click(f"{each} button[aria-pressed], {each} .buttons button")
        browser.wait_for("pair.every(video => video.readyState >= 3)")
        assert browser.value("pair[0].src !== pair[1].src")
        apart(browser)
        browser.wait_for("Math.abs(pair[0].currentTime - pair[1].currentTime) <= 0.1")
        browser.value("pause(), follow = () => {}")  # the negative control
        browser.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # the last one
        apart(browser)
        assert (
            browser.value(
                "new Promise(done => setTimeout(() => done(Math.abs(pair[0].currentTime - pair[1].currentTime)), 200))"
            )
            > 0.2
        )
        browser.click("#close")
        assert browser.value("[$('pair').hidden, chosen.length]") == [True, 0]
        browser.click(f"{other} button:last-child")
        browser.wait_for(f"!document.querySelector('{other}')")


def apart(browser: Browser) -> None:
    """Play both videos, the second ahead by a second, so slowly that none ends meanwhile."""
    browser.value("pair.forEach(video => { video.playbackRate = 0.1; }), seek(0), play()")
    browser.wait_for("pair[0].currentTime > 0")
    browser.value("pair[1].currentTime = 1.2")
    browser.wait_for("!pair[1].seeking")


def test_negative_control_broken_pages(service: Service) -> None:
    """Without its hands no preview is shown; words that become HTML are there, and their script still does not run."""
    html = "element = (name, text = '', kind = '') => { const made = document.createElement(name); made.innerHTML = text; made.className = kind; return made; }"
    with service.opened(broken=f"preview = async () => {{}}, {html}") as browser:
        browser.value(
            "watched = new MutationObserver(() => { window.pictured ||= !!document.querySelector('.place img'); })"
        )
        browser.value("watched.observe(document.body, {childList: true, subtree: true})")
        card = make(browser, HOSTILE, 2, "50")
        browser.wait_for(f"document.querySelector('{card} video')")
        found = f"[window.pictured, window.hacked, document.querySelectorAll('{card} p b').length]"
        assert browser.value(found) == [False, None, 1]


def test_a_running_video_is_cancelled(service: Service) -> None:
    with service.opened() as browser:
        card = make(browser, "one", 3)
        waiting = make(browser, "two", 4)
        browser.wait_for(f"document.querySelector('{card} progress').value > 0")
        for each in (card, waiting):
            assert browser.value(f"document.querySelector('{each} button:last-child').textContent") == "Cancel"
            browser.click(f"{each} button:last-child")
            browser.wait_for(f"!document.querySelector('{each}')")
        listed = "fetch('/v1/videos').then(answer => answer.json()).then(list => list.data.map(video => video.prompt))"
        assert not {"one", "two"} & {*browser.value(listed)}
        kept = make(browser, "one", 3, "4")  # another may be made
        browser.wait_for(f"document.querySelector('{kept} video')")


def test_a_timeline_is_edited_by_mouse_and_keys(service: Service) -> None:
    with service.opened() as browser:
        browser.click("#text")
        browser.write("a red circle")
        browser.click("#track", times=2, by=0.5)
        browser.wait_for("events.length === 2")  # the new event's text has the focus
        browser.value("document.activeElement.select()")
        browser.write("a blue | star]")
        text = "$('text').value"
        assert browser.value(text) == "a red circle [0-1s] | a blue   star  [1s-]"
        browser.value("document.querySelector('.mark').focus()")
        browser.press("ArrowLeft")
        assert browser.value(text) == "a red circle [0-0.5s] | a blue   star  [0.5s-]"
        browser.press("ArrowLeft")  # an event has at least one latent frame
        assert browser.value("document.activeElement.getAttribute('aria-valuenow')") == "0.5"
        browser.drag(".mark", browser.value("$('track').clientWidth / 2"))
        assert browser.value(text) == "a red circle [0-1.5s] | a blue   star  [1.5s-]"
        browser.value("document.querySelector('.mark').focus()")
        browser.press("Delete")
        assert browser.value(text) == "a red circle"
        assert browser.value("document.activeElement.id") == "add"
        browser.value(f"$('text').select(), $('text').value = {TIMELINE!r}, readText()")
        assert browser.value("events.map(each => each.start)") == [0, 0.5]
        browser.value("write = () => ''")  # the negative control
        browser.value("document.querySelector('.mark').focus()")
        browser.press("ArrowRight")
        assert browser.value(text) == ""


@pytest.mark.parametrize(
    "text",
    ["a [0-8] | b [8-]", "a [0-5s] | b [4s-, fade]", "a [0-1s] | b", "a [0-1s] | b [2s-]", "a [1-2s] | b [2s-]"],
)
def test_what_the_line_cannot_show_stays_text(service: Service, text: str) -> None:
    with service.opened() as browser:
        browser.value(f"$('text').value = {text!r}, readText()")
        assert browser.value("[$('editor').hidden, $('as-text').hidden, $('text').value]") == [True, False, text]
        kept = "a [0-0.5s] | b [0.5-1s, cut] | c [1s-2s, fade 0.5s]"
        browser.value(f"$('text').value = {kept!r}, readText(), changed()")
        assert browser.value("$('text').value") == kept


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(service: Service, width: int) -> None:
    over = f"{ROOT}.scrollWidth - {ROOT}.clientWidth"
    with service.opened(width=width) as browser:
        browser.value(f"$('text').value = {TIMELINE!r}, readText()")
        long = (
            "{id: 'x', method: 'direct', seed: 0, seconds: '2', size: '32x32', progress: 0, preview: null, extra: {}, status: 'failed',"
            " prompt: 'a'.repeat(300), error: {message: 'b'.repeat(300)}}"
        )
        browser.value(f"void (clearTimeout(timer), turn++, update({long}), $('gallery').append(cards.get('x').item))")
        assert browser.value(over) == 0
        browser.value(
            "document.querySelectorAll('p').forEach(each => { each.style.overflowWrap = 'normal'; each.style.display = 'block'; each.style.overflow = 'visible'; })"
        )
        assert browser.value(over) > 0  # the negative control
