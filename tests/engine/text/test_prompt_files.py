"""Prompt files: one reader for every command, with one meaning of a line."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.batch.suite import read_suite
from engine.errors import UserError
from engine.text.prompt_files import read_prompt_lines, resolve_negative_prompt, split_lines
from evaluation.vbench.suites import read_vbench_suite
from launch.arguments.prompts import read_prompts

# Ends of line in Unicode, and to str.splitlines, that belong to a prompt here.
OTHER_ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


def read_by_all(path: Path) -> list[list[str]]:
    """The prompts of a file as generate, compare, analyze and calibrate read them, as batch does, and as a negative prompt file."""
    return [
        read_prompts(None, str(path)).texts,
        [prompt.text for prompt in read_suite(path).prompts],
        [text for _, text in read_prompt_lines(path, "--x")],
    ]


@pytest.mark.parametrize("end", OTHER_ENDS, ids=repr)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=repr)
def test_a_line_ends_at_a_newline_only(tmp_path: Path, end: str, newline: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"a red{end}circle{newline}{newline}  a blue star \t{newline}".encode())
    assert read_by_all(path) == [[f"a red{end}circle", "a blue star"]] * 3


def test_numbers_are_those_of_the_file_and_a_mark_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\r\na\r\n\r\n\ufeffb".encode())
    assert read_prompt_lines(path, "--x") == [(2, "a"), (4, "\ufeffb")]
    assert [prompt.line for prompt in read_suite(path).prompts] == [2, 4]
    assert read_prompts(None, str(path)).names == ["line 2 of a.txt", "line 4 of a.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a red circle\ra blue star\r", "line 1: has a carriage return inside"),
        (b"a\nb\r\r\n", "line 2: has a carriage return inside"),
        (b"a\n\xe9", "line 2: not UTF-8 text (byte 1 of the line)"),
        ("a".encode("utf-16"), "line 1: not UTF-8 text (byte 1 of the line)"),
        (b"a\0", "line 1: has a zero byte"),
        (b" \n\xe2\x80\xa8\n", "has no prompt"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused_by_all(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (
        lambda: read_prompts(None, str(path)),
        lambda: read_suite(path),
        lambda: read_prompt_lines(path, "--x"),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert f"{path}, {message}" in str(caught.value) or f"{path} {message}" in str(caught.value)


def test_a_list_of_vbench_is_read_in_the_same_way(tmp_path: Path) -> None:
    folder = tmp_path / "prompts/prompts_per_category"
    folder.mkdir(parents=True)
    (folder / "animal.txt").write_bytes("\ufeffa\u2028cat\r\na dog\n\n".encode())
    assert [each.text for each in read_vbench_suite("vbench:animal", tmp_path).prompts] == ["a\u2028cat", "a dog"]
    (folder / "animal.txt").write_bytes(b"a cat\ra dog\r")
    with pytest.raises(UserError, match=r"animal\.txt, line 1: has a carriage return inside"):
        read_vbench_suite("vbench:animal", tmp_path)


def test_a_missing_file_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read --prompts .*gone\.txt: No such file"):
        read_prompts(None, str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match=r"cannot read --prompts .*: Is a directory"):
        read_prompts(None, str(tmp_path))


def test_a_negative_prompt_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "negative.txt"
    path.write_bytes("\n\ufeff 静态, blurred\r\n".encode())
    assert resolve_negative_prompt(f"@{path}") == "\ufeff 静态, blurred"
    path.write_bytes("\ufeff静态, blurred\r\n".encode())
    assert resolve_negative_prompt(f"@{path}") == "静态, blurred"
    assert resolve_negative_prompt("blurred @ noon") == "blurred @ noon"
    assert resolve_negative_prompt("@@home") == "@home"
    assert resolve_negative_prompt("") == ""
    path.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"--sampler.negative_prompt .*negative\.txt has 2 lines of text; a negative"):
        resolve_negative_prompt(f"@{path}")
    with pytest.raises(UserError, match=r"cannot read --sampler.negative_prompt .*gone: No such file"):
        resolve_negative_prompt(f"@{tmp_path / 'gone'}")


def test_blank_lines_stay_for_those_who_count_them() -> None:
    assert split_lines(b"a\n\n b\r\n", "x") == ["a", "", "b", ""]


def test_reading_needs_no_torch() -> None:
    code = "import sys, engine.text.prompt_files, launch.arguments.prompts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
