"""A headless Chromium, driven by the DevTools protocol over pipes: no driver and no port."""

import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The browser of this machine; None if there is none."""
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Delete": 46, "Home": 36, "End": 35}


class Browser:
    """One page of a headless Chromium, a file or an address, at `width` x `height` CSS pixels; use it as a context manager."""

    def __init__(self, page: Path | str, profile: Path, *, width: int, height: int = 900) -> None:
        from_us, self._to = os.pipe()
        self._from, to_us = os.pipe()
        # The protocol wants its pipes as file descriptors 3 and 4.
        command = (
            f"exec {CHROMIUM} --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--disable-background-networking --disable-component-update --disable-sync --no-proxy-server --mute-audio "
            f'--remote-debugging-pipe --user-data-dir="{profile}" 3<&{from_us} 4>&{to_us}'
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._rest = b""
        self._ids = itertools.count(1)
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.absolute().as_uri())
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are dropped."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise awaited."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript condition holds; the timeout of the test ends a wait that would not."""
        self.value(
            f"new Promise(done => {{ const look = () => ({condition}) ? done() : setTimeout(look, 10); look(); }})"
        )

    def press(self, key: str) -> None:
        """Press and release a key by its name, on what has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def write(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str, *, times: int = 1, by: float = 0.5) -> None:
        """Click on an element, at this share of its width, after it is scrolled into view."""
        x, y = self._spot(selector, by)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def drag(self, selector: str, dx: float) -> None:
        """Drag the middle of an element by `dx` pixels."""
        x, y = self._spot(selector, 0.5)
        for kind, at in (
            ("mousePressed", x),
            ("mouseMoved", x + dx / 2),
            ("mouseMoved", x + dx),
            ("mouseReleased", x + dx),
        ):
            self.call("Input.dispatchMouseEvent", type=kind, x=at, y=y, button="left", buttons=1, clickCount=1)

    def _spot(self, selector: str, by: float) -> tuple[float, float]:
        return self.value(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'center'}});"
            f" const box = one.getBoundingClientRect(); return [box.left + {by} * box.width, box.top + box.height / 2]; }})()"
        )

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "the browser is gone"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)
