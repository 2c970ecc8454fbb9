"""An attention backend that the environment chooses is refused before anything is loaded, by every command that makes videos."""

import importlib
import os
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.cli.start import COMMANDS
from launch.ranks.join import open_ranks
from tests.engine.batch import cases
from tests.launch.forked import run_forked
from tests.launch.test_ranks import one_line, prompted

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


def test_status_is_shown_for_a_finished_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    assert importlib.import_module("launch.arguments.batch").read(["--status=x"]).folder.name == "x"


def test_a_worker_of_a_batch_refuses_what_its_node_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank on Ray inherits the environment of its node, which the command that started the batch cannot see."""
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    with pytest.raises(UserError, match="DIFFUSERS_ATTN_BACKEND is 'sage'"):
        with open_ranks(cases.config(), prompts=[], verbose=False):
            pass


def set_backend_of_one_rank(rank: int) -> None:
    if rank == 1:
        os.environ["DIFFUSERS_ATTN_BACKEND"] = "sage"


def test_a_backend_that_one_rank_alone_has_ends_all_ranks_together(wan_folder: Path, tmp_path: Path) -> None:
    command = prompted(wan_folder, tmp_path / "a.mp4")
    ended = run_forked([command] * 2, tmp_path, fault=set_backend_of_one_rank)
    assert one_line(ended).startswith("rank 1: DIFFUSERS_ATTN_BACKEND is 'sage' in the environment")
