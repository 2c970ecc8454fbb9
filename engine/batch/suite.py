"""The prompts of a batch, one per line of a text file, each with an id that is safe as a file name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.batch.identity import text_sha256
from engine.errors import UserError
from engine.text.prompt_files import read_lines


def check_once(flag: str, given: Sequence[Any]) -> None:
    """Raise UserError for an empty list or duplicates; `flag` is the option that gave it."""
    if len(set(given)) < len(given) or not given:
        raise UserError(f"{flag} needs at least one entry and no duplicates, got {','.join(map(str, given)) or 'none'}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: `p0007` for the eighth non-blank line; file names contain no part of the text.
        line: its line in the source list, from 1.
        text: the prompt, without surrounding space.
        source: the list, if the suite has several.
        prompt_en: VBench's short prompt, from which the text was made.
    """

    prompt_id: str
    line: int
    text: str
    source: str | None = None
    prompt_en: str | None = None

    def where(self, suite: str) -> str:
        """Name in messages: its line in its list, or in the suite of this name."""
        return f"line {self.line} of {self.source or suite}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the text."""
        return text_sha256(self.text)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts in order, each text once.

    Attributes:
        name: the file's name.
        sha256: of the file.
        prompts: the prompts that are made.
        notes: a sentence for each line that was left out.
        source: origin of the prompts for records, if not one file.
    """

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)


def read_suite(path: Path) -> Suite:
    """Read the prompts of a UTF-8 text file, one a line. Blank lines are skipped; a repeated text is made once, with a note.

    Raises UserError for a file that cannot be read, is not UTF-8 (naming the line), or has no prompt.
    """
    lines = read_lines(path, f"--prompts {path}")
    prompts, notes = _number(lines)
    if not prompts:
        raise UserError(f"--prompts {path} has no prompt; write one a line")
    return Suite(name=path.name, sha256=text_sha256("\n".join(lines)), prompts=tuple(prompts), notes=tuple(notes))


def _number(lines: Sequence[str]) -> tuple[list[Prompt], list[str]]:
    prompts: list[Prompt] = []
    notes: list[str] = []
    first: dict[str, int] = {}
    given = [(number, text) for number, text in enumerate(lines, start=1) if text]
    for index, (number, text) in enumerate(given):
        if text in first:
            notes.append(f"line {number} repeats line {first[text]} and is made once")
            continue
        first[text] = number
        prompts.append(Prompt(prompt_id=f"p{index:04d}", line=number, text=text))
    return prompts, notes
