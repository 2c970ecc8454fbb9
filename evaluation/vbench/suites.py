"""Prompt suites of a user's VBench checkout: its own lists by name, and one hashed selection of 100 enhanced prompts.

Nothing of VBench is copied: the lists are read where they lie, and the SHA-256 of each is recorded. Facts about the
files are those of Vchitect/VBench at commit 45e79ec.
"""

import difflib
import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from engine.batch.suite import Prompt, Suite
from engine.errors import UserError
from engine.paths import git_revision
from engine.text.prompt_files import split_lines

PREFIX = "vbench:"
SELECTION = "longer-100"
SELECTION_SIZE = 100
# The suites whose prompts VBench uses for subject consistency, motion smoothness and dynamic degree; background
# consistency; aesthetic and imaging quality: together the six dimensions of the paper's tables.
SELECTION_SUITES = ("subject_consistency", "scene", "overall_consistency")
# `Suite.sha256` of the selection at commit 45e79ec: other files give another selection, and the report says so.
SELECTION_SHA256 = "4369d68daba5efbe55570679fd8c0feadc648159d0be7b75f654a52b0cff40cb"

_PROMPTS = Path("prompts")
_ENHANCED = _PROMPTS / "augmented_prompts" / "gpt_enhanced_prompts"
# Whole-list enhancements by other models, line-aligned with prompts/all_dimension.txt.
_OTHER_ENHANCED = {
    "wan2.1-1.3b": _PROMPTS / "augmented_prompts" / "Wan2.1-T2V-1.3B" / "all_dimension_aug_wanx_seed42.txt",
    "hunyuan": _PROMPTS / "augmented_prompts" / "hunyuan_all_dimension.txt",
}


class _Line(NamedTuple):
    """One line of a list: where it stands, from 0, what the model is given, and VBench's own short prompt, its key."""

    source: str
    line: int
    prompt: str
    prompt_en: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lists:
    """The file of a suite's prompts, and that of the short prompts they were made from, line by line."""

    prompts: Path
    shorts: Path


def read_vbench_suite(spec: str, checkout: Path) -> Suite:
    """Read the suite `vbench:NAME` of a VBench checkout; each text is made once, and its prompt_id is the index in the list.

    NAME is `longer-100` (the selection, see `select_lines`), `all_dimension`, a dimension or a category, each also
    with `_longer` for the GPT-enhanced twin, or `wan2.1-1.3b` or `hunyuan`. Raises UserError, in one line, for an
    unknown name, a folder that is no checkout, and lists that are missing, not UTF-8, have empty lines or do not fit
    together.
    """
    name = spec.removeprefix(PREFIX)
    reader = _Reader(checkout)
    if name == SELECTION:
        lines = _read_selection(reader)
    else:
        known = _known_lists(checkout)
        if name not in known:
            raise UserError(_unknown(name, known, checkout))
        lines = _read_lists(reader, name, known[name])
    digest = _digest(lines)
    prompts: dict[str, Prompt] = {}
    notes = []
    for index, (source, line, text, prompt_en) in enumerate(lines):
        if text in prompts:
            notes.append(f"{source}, line {line + 1} repeats {prompts[text].prompt_id} and is made once")
            continue
        prompts[text] = Prompt(prompt_id=f"p{index:04d}", line=line + 1, text=text, source=source, prompt_en=prompt_en)
    if name == SELECTION and digest != SELECTION_SHA256:
        notes.append(f"this checkout gives another selection than commit 45e79ec, {digest[:12]}")
    return Suite(
        name=PREFIX + name,
        sha256=digest,
        prompts=tuple(prompts.values()),
        notes=tuple(notes),
        source={"commit": checkout_commit(checkout), "files": dict(sorted(reader.files.items()))},
    )


def select_lines(counts: dict[str, int], size: int) -> list[tuple[str, int]]:
    """`size` lines out of suites of `counts` lines: evenly spread in each, every beginning of the list a fair mix.

    Each suite gives in proportion to its length, by largest remainder (equal remainders: the earlier suite). A suite
    of n lines that gives k of them gives lines floor((2i + 1) n / 2k), i = 0..k-1, the middles of k equal parts. All
    are put in the order of (2i + 1) / 2k (equals: the earlier suite), so that the first m prompts hold the suites in
    proportion too. Integers only. Raises UserError if there are fewer lines than asked for.
    """
    total = sum(counts.values())
    if size > total:
        raise UserError(f"cannot select {size} prompts from lists of {total}")
    shares = {suite: count * size // total for suite, count in counts.items()}
    remainders = sorted(counts, key=lambda suite: -(counts[suite] * size % total))
    for suite in remainders[: size - sum(shares.values())]:
        shares[suite] += 1
    order = {suite: place for place, suite in enumerate(counts)}
    spread = [
        (Fraction(2 * i + 1, 2 * share), order[suite], suite, (2 * i + 1) * counts[suite] // (2 * share))
        for suite, share in shares.items()
        for i in range(share)
    ]
    return [(suite, line) for _, _, suite, line in sorted(spread)]


def checkout_commit(checkout: Path) -> str | None:
    """The commit of a git checkout, with `+changes` if tracked files differ from it; None where git cannot tell."""
    found = git_revision(checkout)
    return None if found is None else found["revision"] + "+changes" * found["modified"]


class _Reader:
    """Reads lists of one checkout and keeps the hash of each."""

    def __init__(self, checkout: Path) -> None:
        if not (checkout / _PROMPTS).is_dir():
            raise UserError(
                f"{checkout} is no VBench checkout: it has no folder {_PROMPTS}; clone Vchitect/VBench there"
            )
        self._checkout = checkout
        self.files: dict[str, str] = {}

    def lines(self, path: Path) -> list[str]:
        whole = self._checkout / path
        lines = split_lines(self._bytes(path), str(whole))
        while lines and not lines[-1]:
            lines.pop()
        empty = next((number for number, line in enumerate(lines, 1) if not line), None)
        if empty is not None or not lines:
            raise UserError(f"{whole}, line {empty or 1} is empty; lists are joined line by line")
        return lines

    def _bytes(self, path: Path) -> bytes:
        whole = self._checkout / path
        try:
            data = whole.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {whole}: {error.strerror}; is the VBench checkout whole?") from error
        self.files[path.as_posix()] = hashlib.sha256(data).hexdigest()
        return data


def _known_lists(checkout: Path) -> dict[str, _Lists]:
    """Find every list of the checkout, by the name of its suite."""
    known = {}
    whole = _PROMPTS / "all_dimension.txt"
    for name, path, enhanced in (
        ("all_dimension", whole, _ENHANCED / "all_dimension_longer.txt"),
        ("all_category", _PROMPTS / "all_category.txt", _ENHANCED / "all_category_longer.txt"),
    ):
        known[name] = _Lists(prompts=path, shorts=path)
        known[f"{name}_longer"] = _Lists(prompts=enhanced, shorts=path)
    for name, path in _OTHER_ENHANCED.items():
        known[name] = _Lists(prompts=path, shorts=whole)
    for kind in ("dimension", "category"):
        for path in sorted((checkout / _PROMPTS / f"prompts_per_{kind}").glob("*.txt")):
            short = path.relative_to(checkout)
            longer = _ENHANCED / f"prompts_per_{kind}_longer" / f"{path.stem}_longer.txt"
            known[path.stem] = _Lists(prompts=short, shorts=short)
            known[f"{path.stem}_longer"] = _Lists(prompts=longer, shorts=short)
    return {name: lists for name, lists in known.items() if (checkout / lists.prompts).is_file()}


def _read_lists(reader: _Reader, name: str, lists: _Lists) -> list[_Line]:
    prompts, shorts = reader.lines(lists.prompts), reader.lines(lists.shorts)
    if len(prompts) != len(shorts):
        raise UserError(
            f"{lists.prompts} has {len(prompts)} lines and {lists.shorts} has {len(shorts)}; they are joined "
            "line by line"
        )
    return [_Line(name, i, prompt, short) for i, (prompt, short) in enumerate(zip(prompts, shorts, strict=True))]


def _read_selection(reader: _Reader) -> list[_Line]:
    suites = {}
    for suite in SELECTION_SUITES:
        lists = _Lists(
            prompts=_ENHANCED / "prompts_per_dimension_longer" / f"{suite}_longer.txt",
            shorts=_PROMPTS / "prompts_per_dimension" / f"{suite}.txt",
        )
        suites[suite] = _read_lists(reader, f"{suite}_longer", lists)
    chosen = select_lines({suite: len(lines) for suite, lines in suites.items()}, SELECTION_SIZE)
    return [suites[suite][line] for suite, line in chosen]


def _digest(lines: list[_Line]) -> str:
    """SHA-256 of one line `index, source, line, prompt_en, prompt` each, separated by tabs."""
    rows = "".join(
        f"{i}\t{each.source}\t{each.line}\t{each.prompt_en}\t{each.prompt}\n" for i, each in enumerate(lines)
    )
    return hashlib.sha256(rows.encode()).hexdigest()


def _unknown(name: str, known: dict[str, _Lists], checkout: Path) -> str:
    nearest = difflib.get_close_matches(name, [SELECTION, *known], n=1, cutoff=0.5)
    hint = f"; did you mean {PREFIX}{nearest[0]}?" if nearest else f"; it has {', '.join([SELECTION, *known])}"
    return f"{checkout} has no prompt list {name!r}{hint}"
