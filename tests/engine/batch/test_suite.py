"""Prompt files of users: each line is made, skipped with a note, or reported in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.batch.items import FILE, Batch, claim_folder, plan_batch
from engine.batch.suite import read_suite
from engine.batch.variants import Variant
from engine.errors import UserError
from tests.engine.batch.cases import batch, config, suite


def test_odd_lines_are_made_under_safe_names(tmp_path: Path) -> None:
    odd = ["../../etc/passwd", "/absolute/path.mp4", "a\u2028b", "x" * 10_000, "-rf *", "con.mp4", "é 中 \x1b[2J"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n".join(["\ufeff" + odd[0], "", *odd[1:], "   ", odd[0], ""]).encode())
    suite = read_suite(path)
    assert [prompt.text for prompt in suite.prompts] == odd
    assert [prompt.prompt_id for prompt in suite.prompts] == [f"p{i:04d}" for i in range(7)]
    assert [prompt.line for prompt in suite.prompts] == [1, 3, 4, 5, 6, 7, 8]
    assert suite.notes == ("line 10 repeats line 1 and is made once",)
    assert {item.name for item in batch(*odd).items} == {f"p{i:04d}-s{s}" for i in range(7) for s in (0, 1)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb \xff c\n", r"line 2: not UTF-8 text \(byte 3 of the line\)"),
        (b"a\0b\n", "line 1: has a zero byte"),
        (b"\n \n", "has no prompt; write one a line"),
        (b"", "has no prompt"),
    ],
)
def test_files_that_are_no_suites(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_suite(tmp_path / "prompts.txt")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="cannot read --prompts"):
            read_suite(path)


def test_a_folder_takes_more_prompts_seeds_and_methods(tmp_path: Path) -> None:
    claim_folder(tmp_path, batch("a", "b", methods=("freespec",), seeds=(0,)))
    claim_folder(tmp_path, batch("a", "b", "c", methods=("direct",), seeds=(1, 2)))
    claim_folder(tmp_path, batch("a", methods=("direct", "freespec")))


def test_a_folder_takes_nothing_else(tmp_path: Path) -> None:
    claim_folder(tmp_path, batch("a", "b"))
    with pytest.raises(
        UserError, match=r"changed: sampler.guidance_scale 5.0 -> 4.0; choose another folder, or the same"
    ):
        claim_folder(tmp_path, batch("a", "b", guidance_scale=4.0))
    with pytest.raises(
        UserError, match=r"holds another prompt p0001 \(line 2 of prompts.txt is 'c', before it was 'b'\)"
    ):
        claim_folder(tmp_path, batch("a", "c"))
    with pytest.raises(UserError, match=r"--seeds needs at least one entry and no duplicates, got 1,1"):
        batch("a", seeds=(1, 1))
    with pytest.raises(UserError, match=r"sampler\.seed must lie in"):
        batch("a", seeds=(-1,))


def test_folder_distinguishes_variants_of_one_method(tmp_path: Path) -> None:
    plain, other = variants("alpha", 5.0, 1.0)
    both = planned(plain, other)
    claim_folder(tmp_path, both)
    assert [item.label for item in both.items] == ["freespec/p0000-s0", "other/p0000-s0"]
    assert len({item.item_id for item in both.items}) == 2
    claim_folder(tmp_path, planned(other))
    with pytest.raises(
        UserError, match=r"holds other videos of another configuration; changed: method.settings.alpha 1.0 -> 5.0"
    ):
        claim_folder(tmp_path, planned(replace(plain, label="other")))
    for twice, why in (
        (replace(plain, label="x"), "have the same settings"),
        (replace(other, label="FreeSpec"), "two variants"),
    ):
        with pytest.raises(UserError, match=why):
            planned(plain, twice)


def test_a_folder_of_an_older_version_names_methods_alone(tmp_path: Path) -> None:
    plain, other = variants("alpha", 5.0, 1.0)
    claim_folder(tmp_path, planned(plain))
    tree = json.loads((tmp_path / FILE).read_text())
    assert tree.pop("variants") == planned(plain).config_ids
    (tmp_path / FILE).write_text(json.dumps(tree))
    claim_folder(tmp_path, planned(plain, other))
    (tmp_path / FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="holds freespec videos of another configuration"):
        claim_folder(tmp_path, planned(replace(other, label="freespec")))


def variants(setting: str, *values: float) -> list[Variant]:
    method = config().method
    found = [replace(method, freespec=replace(method.freespec, **{setting: value})) for value in values]
    labels = ("freespec", "other")
    return [
        Variant(label=label, config=replace(config(), method=each)) for label, each in zip(labels, found, strict=True)
    ]


def planned(*given: Variant) -> Batch:
    return plan_batch(given, suite("a red circle"), seeds=(0,), checkpoint="c", dtype="float32")
