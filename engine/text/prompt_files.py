"""Text files with one prompt per line, as every command reads them. Imports no torch."""

from pathlib import Path

from engine.errors import UserError
from engine.paths import expand

NEGATIVE_SETTING = "sampler.negative_prompt"


def read_prompt_lines(path: Path, flag: str) -> list[tuple[int, str]]:
    r"""Read the lines of a prompt file that are not blank, stripped, each with its number from 1.

    Only \n and \r\n end a line: U+2028, U+0085 and form feeds belong to a prompt. `flag` is the option that names the file.

    Raises:
        UserError: the file cannot be read or has no prompt, or a line is invalid; see `split_lines`.
    """
    lines = [(number, text) for number, text in enumerate(read_lines(path, f"{flag} {path}"), start=1) if text]
    if not lines:
        raise UserError(f"{flag} {path} has no prompt; write one a line")
    return lines


def read_lines(path: Path, name: str) -> list[str]:
    """Read all lines of a file, also blank ones; messages call it `name`. See `split_lines`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    return split_lines(data, name)


def split_lines(data: bytes, name: str) -> list[str]:
    r"""Split a UTF-8 text, with or without a byte order mark, into stripped lines.

    Raises:
        UserError: a line is not UTF-8, or holds a zero byte or an inner carriage return. Files whose lines end in \r alone would
            otherwise be one long prompt.
    """
    return [_decode(line, name, number) for number, line in enumerate(data.split(b"\n"), start=1)]


def _decode(line: bytes, name: str, number: int) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, line {number}: not UTF-8 text (byte {error.start + 1} of the line)") from error
    if "\0" in text:
        raise UserError(f"{name}, line {number}: has a zero byte; is this a text file?")
    if "\r" in text.removesuffix("\r"):
        raise UserError(
            f"{name}, line {number}: has a carriage return inside; end lines with \\n or \\r\\n, and leave it out of prompts"
        )
    return text.strip()


def resolve_negative_prompt(text: str) -> str:
    """Resolve `sampler.negative_prompt`: `@FILE` is the one line of a file, `@@...` a text that starts with @."""
    if text.startswith("@@") or not text.startswith("@"):
        return text.removeprefix("@")
    path = expand(text[1:])
    lines = read_prompt_lines(path, f"--{NEGATIVE_SETTING}")
    if len(lines) > 1:
        raise UserError(f"--{NEGATIVE_SETTING} {path} has {len(lines)} lines of text; a negative prompt is one line")
    return lines[0][1]
