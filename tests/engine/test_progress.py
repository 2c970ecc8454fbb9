"""Bars: where they are wanted, and nowhere else."""

import sys

import pytest

from engine.progress import enabled, progress_bar


def test_auto_shows_bars_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert enabled("auto") is terminal
        assert enabled("on")
        assert not enabled("off")


def test_a_bar_shows_stage_count_and_mode_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=4, initial=1, desc="denoise", enabled=True) as bar:
        bar.set_postfix(mode="dual")
        bar.update(3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(word in shown.err for word in ("denoise", "4/4", "100%", "mode=dual", "left"))


def test_a_bar_that_is_off_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(total=4, desc="decode", enabled=False) as bar:
        bar.set_postfix(mode="local")
        bar.update(4)
    assert capsys.readouterr().err == ""
