"""Prompt suites of a user's VBench checkout: its own lists by name, and one hashed selection of 100 enhanced prompts.

Nothing of VBench is copied: the lists are read where they lie, and the SHA-256 of each is recorded. Facts about the
files are those of Vchitect/VBench at commit 45e79ec.
"""

import difflib
import hashlib
import shutil
import subprocess
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from engine.batch.suite import Prompt, Suite
from engine.errors import UserError
from engine.files.trees import parse_json
from engine.shown import quoted
from engine.text.prompt_files import split_lines

PREFIX = "vbench:"
SELECTION = "longer-100"
SELECTION_SIZE = 100
# The suites whose prompts VBench uses for subject consistency, motion smoothness and dynamic degree; background
# consistency; aesthetic and imaging quality: together the six dimensions of the paper's tables.
SELECTION_SUITES = ("subject_consistency", "scene", "overall_consistency")
# `VbenchSuite.sha256` of the selection at commit 45e79ec: other files give another selection, and the report says so.
SELECTION_SHA256 = "4369d68daba5efbe55570679fd8c0feadc648159d0be7b75f654a52b0cff40cb"

_PROMPTS = Path("prompts")
_ENHANCED = _PROMPTS / "augmented_prompts" / "gpt_enhanced_prompts"
_FULL_INFO = (Path("vbench2_beta_long/VBench_full_info.json"), Path("vbench/VBench_full_info.json"))
# Whole-list enhancements by other models, line-aligned with prompts/all_dimension.txt.
_OTHER_ENHANCED = {
    "wan2.1-1.3b": _PROMPTS / "augmented_prompts" / "Wan2.1-T2V-1.3B" / "all_dimension_aug_wanx_seed42.txt",
    "hunyuan": _PROMPTS / "augmented_prompts" / "hunyuan_all_dimension.txt",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        index: place in the suite, from 0; the batch's prompt_id is made of it.
        prompt: what the model is given.
        prompt_en: VBench's own short prompt, its key; the same as `prompt` in lists that are not enhanced.
        dimensions: what VBench scores this prompt for, sorted; empty for category lists.
        source: the list it comes from.
        line: its line there, from 0.
    """

    index: int
    prompt: str
    prompt_en: str
    dimensions: tuple[str, ...]
    source: str
    line: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VbenchSuite:
    """A list of prompts and where it comes from.

    Attributes:
        name: such as `vbench:longer-100`.
        prompts: in order.
        files: SHA-256 of every file that was read, by its path inside the checkout.
        commit: of the checkout, or None where git cannot tell.
        sha256: of the prompts themselves: one line `index, source, line, prompt_en, prompt` each, separated by tabs.
    """

    name: str
    prompts: tuple[SuitePrompt, ...]
    files: dict[str, str]
    commit: str | None
    sha256: str

    @property
    def is_known(self) -> bool | None:
        """Whether the selection equals that of commit 45e79ec; None for plain lists."""
        return self.sha256 == SELECTION_SHA256 if self.name == PREFIX + SELECTION else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lists:
    """The file of a suite's prompts, and that of the short prompts they were made from, line by line."""

    prompts: Path
    shorts: Path
    dimension: str | None  # the suite's own dimension, which tells equal short prompts of two suites apart


def read_vbench_suite(spec: str, checkout: Path) -> VbenchSuite:
    """Read the suite `vbench:NAME` of a VBench checkout.

    NAME is `longer-100` (the selection, see `select_lines`), `all_dimension`, a dimension or a category, each also
    with `_longer` for the GPT-enhanced twin, or `wan2.1-1.3b` or `hunyuan`. Raises UserError, in one line, for an
    unknown name, a folder that is no checkout, and lists that are missing, not UTF-8, have empty lines or do not fit
    together.
    """
    name = spec.removeprefix(PREFIX)
    reader = _Reader(checkout)
    if name == SELECTION:
        prompts = _read_selection(reader)
    else:
        known = _known_lists(checkout)
        if name not in known:
            raise UserError(_unknown(name, known, checkout))
        prompts = _read_lists(reader, name, known[name])
    return VbenchSuite(
        name=PREFIX + name,
        prompts=tuple(prompts),
        files=dict(sorted(reader.files.items())),
        commit=checkout_commit(checkout),
        sha256=_digest(prompts),
    )


def to_batch(suite: VbenchSuite) -> Suite:
    """Convert to a suite of launch/batch.py, each text once: prompt_id is the index in the list, `line` that in `source`."""
    prompts: dict[str, Prompt] = {}
    notes = []
    for prompt in suite.prompts:
        if prompt.prompt in prompts:
            first = prompts[prompt.prompt].prompt_id
            notes.append(f"{prompt.source}, line {prompt.line + 1} repeats {first} and is made once")
            continue
        prompts[prompt.prompt] = Prompt(
            prompt_id=f"p{prompt.index:04d}",
            line=prompt.line + 1,
            text=prompt.prompt,
            source=prompt.source,
            prompt_en=prompt.prompt_en,
        )
    if suite.is_known is False:
        notes.append(f"this checkout gives another selection than commit 45e79ec, {suite.sha256[:12]}")
    source = {"commit": suite.commit, "files": suite.files}
    return Suite(
        name=suite.name, sha256=suite.sha256, prompts=tuple(prompts.values()), notes=tuple(notes), source=source
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
    if shutil.which("git") is None or not (checkout / ".git").exists():
        return None
    revision, status = (
        subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    if revision.returncode or status.returncode:
        return None
    return revision.stdout.strip() + ("+changes" if status.stdout.strip() else "")


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

    def dimensions(self) -> list[tuple[str, tuple[str, ...]]]:
        """(prompt_en, dimensions) of the full-info file, in its order."""
        path = next((path for path in _FULL_INFO if (self._checkout / path).is_file()), None)
        if path is None:
            raise UserError(f"{self._checkout} has neither {_FULL_INFO[0]} nor {_FULL_INFO[1]}")
        try:
            return [
                (entry["prompt_en"], tuple(sorted(entry["dimension"])))
                for entry in parse_json(self._bytes(path), str(self._checkout / path))
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._checkout / path} is not VBench's list of prompts and dimensions") from error

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
        known[name] = _Lists(prompts=path, shorts=path, dimension=None)
        known[f"{name}_longer"] = _Lists(prompts=enhanced, shorts=path, dimension=None)
    for name, path in _OTHER_ENHANCED.items():
        known[name] = _Lists(prompts=path, shorts=whole, dimension=None)
    for kind in ("dimension", "category"):
        for path in sorted((checkout / _PROMPTS / f"prompts_per_{kind}").glob("*.txt")):
            short = path.relative_to(checkout)
            longer = _ENHANCED / f"prompts_per_{kind}_longer" / f"{path.stem}_longer.txt"
            dimension = path.stem if kind == "dimension" else None
            known[path.stem] = _Lists(prompts=short, shorts=short, dimension=dimension)
            known[f"{path.stem}_longer"] = _Lists(prompts=longer, shorts=short, dimension=dimension)
    return {name: lists for name, lists in known.items() if (checkout / lists.prompts).is_file()}


def _read_lists(reader: _Reader, name: str, lists: _Lists) -> list[SuitePrompt]:
    prompts, shorts = reader.lines(lists.prompts), reader.lines(lists.shorts)
    if len(prompts) != len(shorts):
        raise UserError(
            f"{lists.prompts} has {len(prompts)} lines and {lists.shorts} has {len(shorts)}; they are joined "
            "line by line"
        )
    dimensions = _dimensions_of(shorts, lists, reader)
    return [
        SuitePrompt(index=i, prompt=prompt, prompt_en=short, dimensions=found, source=name, line=i)
        for i, (prompt, short, found) in enumerate(zip(prompts, shorts, dimensions, strict=True))
    ]


def _dimensions_of(shorts: list[str], lists: _Lists, reader: _Reader) -> list[tuple[str, ...]]:
    """The dimensions of each short prompt: by line in the whole list, by name in a dimension's list."""
    if "category" in lists.shorts.as_posix():
        return [()] * len(shorts)
    info = reader.dimensions()
    if lists.dimension is None:
        if [prompt for prompt, _ in info] != shorts:
            raise UserError(f"{lists.shorts} and the full-info file of this checkout do not list the same prompts")
        return [dimensions for _, dimensions in info]
    found = {prompt: dimensions for prompt, dimensions in info if lists.dimension in dimensions}
    missing = next((short for short in shorts if short not in found), None)
    if missing is not None:
        raise UserError(f"the full-info file of this checkout has no {lists.dimension} prompt {quoted(missing[:60])}")
    return [found[short] for short in shorts]


def _read_selection(reader: _Reader) -> list[SuitePrompt]:
    suites = {}
    for suite in SELECTION_SUITES:
        lists = _Lists(
            prompts=_ENHANCED / "prompts_per_dimension_longer" / f"{suite}_longer.txt",
            shorts=_PROMPTS / "prompts_per_dimension" / f"{suite}.txt",
            dimension=suite,
        )
        suites[suite] = _read_lists(reader, f"{suite}_longer", lists)
    chosen = select_lines({suite: len(prompts) for suite, prompts in suites.items()}, SELECTION_SIZE)
    return [replace(suites[suite][line], index=index) for index, (suite, line) in enumerate(chosen)]


def _digest(prompts: list[SuitePrompt]) -> str:
    rows = "".join(f"{p.index}\t{p.source}\t{p.line}\t{p.prompt_en}\t{p.prompt}\n" for p in prompts)
    return hashlib.sha256(rows.encode()).hexdigest()


def _unknown(name: str, known: dict[str, _Lists], checkout: Path) -> str:
    nearest = difflib.get_close_matches(name, [SELECTION, *known], n=1, cutoff=0.5)
    hint = f"; did you mean {PREFIX}{nearest[0]}?" if nearest else f"; it has {', '.join([SELECTION, *known])}"
    return f"{checkout} has no prompt list {name!r}{hint}"
