"""Captions read back: the words of a scene from a sentence that `tiny.world.caption` could have written."""

import re
from dataclasses import dataclass

from tiny.world import BACKGROUNDS, COLOURS, PHRASES, SHAPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a caption tells, in the words of `tiny.world.Scene`; what it does not say has the value that means."""

    shape: str
    colour: str
    size: str
    motion: str
    speed: str
    background: str
    pan: str


_MOTIONS = {phrase: motion for motion, phrases in PHRASES.items() for phrase in phrases}


def _one_of(words: object) -> str:
    """A pattern of alternatives, longest first, so that `bounces around` is not read as `bounces`."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_CAPTION = re.compile(
    rf"(?:a|the) (?:(?P<size>small|large) )?(?P<colour>{_one_of(COLOURS)}) (?P<shape>{_one_of(SHAPES)}) "
    rf"(?P<motion>{_one_of(_MOTIONS)})(?P<speed> fast| quickly)? (?:over|on) a (?P<background>{_one_of(BACKGROUNDS)}) "
    r"background(?:, the camera pans (?P<pan>left|right))?",
    re.IGNORECASE,
)


def parse_caption(text: str) -> Told | None:
    """The scene's words, or None for no caption of this world. Case, outer spaces and a full stop do not matter."""
    found = _CAPTION.fullmatch(" ".join(text.split()).removesuffix("."))
    if found is None:
        return None
    words = {name: word and word.lower() for name, word in found.groupdict().items()}
    return Told(
        shape=words["shape"],
        colour=words["colour"],
        size=words["size"] or "large",
        motion=_MOTIONS[words["motion"]],
        speed="fast" if words["speed"] else "normal",
        background=words["background"],
        pan=words["pan"] or "none",
    )
