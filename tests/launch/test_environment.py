"""An attention backend that the environment chooses is refused before anything is loaded, by every command that makes videos."""

import importlib

import pytest

from engine.errors import UserError
from launch.start import COMMANDS

MAKE_NONE = {"plan", "decode", "evaluate", "findings"}


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - MAKE_NONE))
def test_an_attention_backend_of_the_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = importlib.import_module(f"launch.arguments.{name}").read
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    with pytest.raises(UserError, match=r"DIFFUSERS_ATTN_BACKEND is 'sage' .* unset it, and give --attention.kernel"):
        read([])
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "native")
    try:
        read([])
    except UserError as error:
        assert "DIFFUSERS_ATTN_BACKEND" not in str(error)


def test_a_batch_is_told_its_status_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    assert importlib.import_module("launch.arguments.batch").read(["--status=x"]).folder.name == "x"
