"""The methods by name. A method is one file here and one line in METHODS."""

import dataclasses
import difflib
from typing import Any

from freespec.methods.base import Method, Mode, StepPlan
from freespec.methods.direct import Direct
from freespec.methods.freespec import FreeSpec
from freespec.methods.sliding_window import SlidingWindow

__all__ = ["METHODS", "Direct", "FreeSpec", "Method", "Mode", "SlidingWindow", "StepPlan", "make_method"]

METHODS: dict[str, type] = {"direct": Direct, "sliding_window": SlidingWindow, "freespec": FreeSpec}


def make_method(name: str, **settings: Any) -> Method:
    """The method called `name` with these settings; ValueError names the nearest valid word for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{_nearest(name, METHODS)}; choose one of {', '.join(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in settings:
        if key not in known:
            what = f"has the settings {', '.join(known)}" if known else "has no settings"
            raise ValueError(f"method {name!r} does not know {key!r}{_nearest(key, known)}; it {what}")
    method: Method = METHODS[name](**settings)
    return method


def _nearest(word: str, words: Any) -> str:
    match = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
