"""Suites of a VBench checkout: joined by line, hashed, selected by a rule, refused where they do not fit together."""

import os
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from evaluation.vbench import suites
from evaluation.vbench.suites import read_vbench_suite, select_lines

COUNTS = {"subject_consistency": 72, "scene": 86, "overall_consistency": 93}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The shape of a checkout, with sentences of our own; one short prompt is in two suites, with two enhancements."""
    enhanced = tmp_path / "prompts/augmented_prompts/gpt_enhanced_prompts"
    (tmp_path / "prompts/prompts_per_dimension").mkdir(parents=True)
    (tmp_path / "prompts/prompts_per_category").mkdir()
    (enhanced / "prompts_per_dimension_longer").mkdir(parents=True)
    shorts, longer = [], []
    for suite, count in COUNTS.items():
        names = ["a shared sentence" if i == 3 and suite != "scene" else f"{suite} {i}" for i in range(count)]
        more = [f"{name}, told at length in {suite}" for name in names]
        write(tmp_path / f"prompts/prompts_per_dimension/{suite}.txt", names)
        write(enhanced / f"prompts_per_dimension_longer/{suite}_longer.txt", more)
        shorts, longer = shorts + names, longer + more
    write(tmp_path / "prompts/all_dimension.txt", shorts)
    write(enhanced / "all_dimension_longer.txt", longer)
    write(tmp_path / "prompts/prompts_per_category/animal.txt", ["a cat", "a dog"])
    return tmp_path


def write(path: Path, lines: list[str]) -> None:
    """Without a newline at the end, as upstream has it."""
    path.write_text("\n".join(lines), encoding="utf-8")


def test_the_selection_follows_its_rule(checkout: Path) -> None:
    suite = read_vbench_suite("vbench:longer-100", checkout)
    assert [prompt.prompt_id for prompt in suite.prompts] == [f"p{index:04d}" for index in range(100)]
    assert shares(suite.prompts) == {"subject_consistency": 29, "scene": 34, "overall_consistency": 37}
    for prompt in suite.prompts:
        source = prompt.source.removesuffix("_longer")
        assert prompt.text == f"{prompt.prompt_en}, told at length in {source}"
    assert "another selection than commit 45e79ec" in suite.notes[0]  # our sentences are not VBench's


def shares(prompts: Any) -> dict[str, int]:
    """How many prompts each suite gives."""
    return {suite: sum(prompt.source == f"{suite}_longer" for prompt in prompts) for suite in COUNTS}


def test_every_beginning_of_the_selection_is_a_fair_mix() -> None:
    chosen = select_lines(COUNTS, 100)
    for length in range(1, 101):
        for suite, share in {"subject_consistency": 29, "scene": 34, "overall_consistency": 37}.items():
            found = sum(name == suite for name, _ in chosen[:length])
            assert abs(found - length * share / 100) < 1.5


def test_lines_are_the_middles_of_equal_parts() -> None:
    """The rule again, with fractions and loops instead of integers and a sort."""
    chosen = select_lines(COUNTS, 100)
    for suite, share in {"subject_consistency": 29, "scene": 34, "overall_consistency": 37}.items():
        lines = [line for name, line in chosen if name == suite]
        middles = [(Fraction(i) + Fraction(1, 2)) * COUNTS[suite] / share for i in range(share)]
        assert lines == [int(middle) for middle in middles]
        assert len(set(lines)) == share


@pytest.mark.parametrize(("counts", "size"), [({"a": 1, "b": 9}, 10), ({"a": 5}, 3), ({"a": 2, "b": 2, "c": 2}, 4)])
def test_any_counts_give_as_many_as_asked_for(counts: dict[str, int], size: int) -> None:
    chosen = select_lines(counts, size)
    assert len(chosen) == len(set(chosen)) == size
    assert all(0 <= line < counts[suite] for suite, line in chosen)
    with pytest.raises(UserError, match="cannot select"):
        select_lines(counts, sum(counts.values()) + 1)


def test_a_short_prompt_of_two_suites_has_its_own_long_one(checkout: Path) -> None:
    for name in ("subject_consistency", "overall_consistency"):
        prompt = read_vbench_suite(f"{name}_longer", checkout).prompts[3]
        assert (prompt.prompt_en, prompt.text) == ("a shared sentence", f"a shared sentence, told at length in {name}")


def test_a_batch_makes_each_text_once_and_records_the_source(checkout: Path) -> None:
    suite = read_vbench_suite("vbench:all_dimension", checkout)
    assert len(suite.prompts) == 250  # of 251 lines
    assert suite.prompts[3].text == "a shared sentence"
    assert [prompt.prompt_id for prompt in suite.prompts[160:163]] == ["p0160", "p0162", "p0163"]
    assert suite.notes == ("all_dimension, line 162 repeats p0003 and is made once",)
    assert suite.source["commit"] is None
    assert list(suite.source["files"]) == ["prompts/all_dimension.txt"]
    # `line` is a line of a list, and every prompt says of which, and what VBench itself calls it.
    chosen = read_vbench_suite("longer-100", checkout).prompts
    for prompt, (source, line) in zip(chosen, select_lines(COUNTS, 100), strict=True):
        assert (prompt.source, prompt.line) == (f"{source}_longer", line + 1)
    assert [prompt.text for prompt in read_vbench_suite("vbench:animal", checkout).prompts] == ["a cat", "a dog"]
    assert not read_vbench_suite("vbench:animal", checkout).notes


def test_every_file_that_is_read_is_hashed(checkout: Path) -> None:
    first = read_vbench_suite("vbench:longer-100", checkout)
    assert len(first.source["files"]) == 6
    path = checkout / "prompts/augmented_prompts/gpt_enhanced_prompts/prompts_per_dimension_longer/scene_longer.txt"
    path.write_text(path.read_text().replace("scene 1,", "scene one,"), encoding="utf-8")
    second = read_vbench_suite("vbench:longer-100", checkout)
    name = path.relative_to(checkout).as_posix()
    assert [key for key, digest in first.source["files"].items() if digest != second.source["files"][key]] == [name]
    assert first.sha256 != second.sha256


def test_the_commit_is_recorded(checkout: Path) -> None:
    assert read_vbench_suite("animal", checkout).source["commit"] is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *identity, *words], cwd=checkout, check=True, capture_output=True, text=True
        ).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    commit = git("rev-parse", "HEAD").strip()
    assert read_vbench_suite("animal", checkout).source["commit"] == commit
    write(checkout / "prompts/all_dimension.txt", ["changed"])
    assert read_vbench_suite("animal", checkout).source["commit"] == f"{commit}+changes"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("vbench:sceen", "did you mean vbench:scene"),
        ("vbench:zzz", "it has longer-100, all_dimension"),
        ("vbench:wan2.1-1.3b", "has no prompt list"),
    ],
)
def test_unknown_names(checkout: Path, spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_vbench_suite(spec, checkout)


def test_lists_that_do_not_fit_together(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    scene = checkout / "prompts/prompts_per_dimension/scene.txt"
    lines = scene.read_text().split("\n")
    write(scene, lines[:-1])
    with pytest.raises(UserError, match=r"has 86 lines and .* has 85"):
        read_vbench_suite("scene_longer", checkout)
    write(scene, [*lines[:4], "", *lines[5:]])
    with pytest.raises(UserError, match="line 5 is empty"):
        read_vbench_suite("scene", checkout)
    scene.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="line 1: not UTF-8 text"):
        read_vbench_suite("vbench:longer-100", checkout)
    with pytest.raises(UserError, match="is no VBench checkout"):
        read_vbench_suite("scene", tmp_path_factory.mktemp("empty"))


@pytest.mark.skipif("VBENCH_CHECKOUT" not in os.environ, reason="VBENCH_CHECKOUT names no checkout of VBench")
def test_the_real_lists() -> None:
    checkout = Path(os.environ["VBENCH_CHECKOUT"])
    suite = read_vbench_suite("vbench:longer-100", checkout)
    assert suite.sha256 == suites.SELECTION_SHA256
    assert not suite.notes
    whole = read_vbench_suite("vbench:all_dimension_longer", checkout).prompts
    assert (len(whole), len({p.text for p in whole}), len({p.prompt_en for p in whole})) == (946, 946, 944)
    assert all("_" not in p.prompt_en and "/" not in p.prompt_en for p in whole)
