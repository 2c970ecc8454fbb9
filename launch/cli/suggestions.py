"""Advice on an unknown option: the setting it corresponds to, or why it is not supported."""

import difflib
import shlex
from collections.abc import Callable, Collection

from engine.config import describe_old_setting
from launch.cli.foreign import ANSWERS, FLAGS, MEANS_OTHERWISE, RENAMED, as_video, converted

# Least similarity of a name that is suggested.
_ALIKE = 0.8

CommandsWith = Callable[[str], tuple[list[str], str]]
"""The commands that have or had an option of this name, and its current name."""


def describe_unknown(
    key: str, keys: Collection[str], *, commands_with: CommandsWith, value: str | None = None, where: str = ""
) -> str:
    """Describe a name that is not among `keys`; with `value`, give the equivalent of another program's option."""
    advice = _advice(key.replace("-", "_").lower(), keys, value, commands_with)
    return f"unknown setting {key}{where}; {advice}"


def _advice(key: str, keys: Collection[str], value: str | None, commands_with: CommandsWith) -> str:
    if key in keys:
        return f"did you mean {key}?"
    old = describe_old_setting(key, value)
    if old is not None:
        return old
    other = foreign(key, keys, value)
    if other is not None:
        return other
    likely = _same_last_part(key, keys)
    owners, today = ([], key) if likely else commands_with(key)
    if today != key:  # a former name
        likely = [today] if today in keys else _same_last_part(today, keys)
    if owners and not likely:
        name = "it" if today == key else f"--{today}"
        owner_note = f"{name} is an option of {' and '.join(owners)}; " if len(owners) < 3 else ""
        return f"{owner_note}this command does not use it; leave it out"
    likely = likely or [near for near in [nearest_key(key, keys)] if near]
    return f"did you mean {' or '.join(likely)}?" if likely else "see --help"


def _same_last_part(key: str, keys: Collection[str]) -> list[str]:
    """The names whose last part is `key`; empty if there are four or more."""
    found = [each for each in sorted(keys) if each.rpartition(".")[2] == key]
    return found if len(found) < 4 else []


def foreign(key: str, keys: Collection[str], value: str | None) -> str | None:
    """Answer an option of another program; None if no known program has it."""
    words = _written_here(key, keys, value)
    if words is None:
        return ANSWERS.get(key)
    return f"did you mean {words}?" if words else "this command does not use it; leave it out"


def _written_here(name: str, keys: Collection[str], value: str | None) -> str | None:
    """The equivalent options, with the value if known; "" if this command has none, None for an unknown name."""
    settings = converted(name, value)
    if settings is None and name in FLAGS:
        settings = {} if value is not None and value.lower() in ("false", "0", "no") else FLAGS[name]
    if settings is not None:
        known = {target: text for target, text in settings.items() if target in keys}
        if "" in known.values() or (value is None and name not in FLAGS):
            return " and ".join(known)
        return " ".join(f"--{target} {shlex.quote(text)}" for target, text in known.items())
    if name not in RENAMED:
        return None
    target = next((each for each in RENAMED[name] if each in keys and MEANS_OTHERWISE.get(each) not in keys), None)
    if target is None:
        return ""
    if value is None or "." in name:  # a former name of ours with other values
        return target
    return f"--{target} {shlex.quote(as_video(name, value) if target in ('output.path', 'output') else value)}"


def nearest_key(key: str, keys: Collection[str]) -> str | None:
    """The name most similar to `key`, as a whole or in its last part; None below the least similarity."""
    group, _, last = key.rpartition(".")

    def likeness(other: str) -> tuple[float, float]:
        other_group, _, other_last = other.rpartition(".")
        whole = _ratio(key, other)
        scores = [whole, _ratio(last, other_last) if not group or _ratio(group, other_group) >= _ALIKE else 0.0]
        if group and group == other_group:  # `method.windw`: one matching word is enough within the same group
            scores += [_ratio(last, word) for word in other_last.split("_")]
        return max(scores), whole

    best = max(sorted(keys), key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= _ALIKE else None


def _ratio(one: str, other: str) -> float:
    # In names of one or two letters a single common letter would suffice.
    if min(len(one), len(other)) < 3:
        return float(one == other)
    return difflib.SequenceMatcher(None, one, other).ratio()
