"""The methods by name. A method is one file here and one line in METHODS, or a class of the user's own by import path."""

import dataclasses
import difflib
import importlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freespec.methods.base import Branches, Grid, Layer, Method, Mode, Noise, StepPlan, Tier
from freespec.methods.direct import Direct
from freespec.methods.direct_far import DirectFar
from freespec.methods.freeloc import FreeLOC
from freespec.methods.freelong import FreeLong
from freespec.methods.freelong_pp import FreeLongPP
from freespec.methods.freenoise import FreeNoise
from freespec.methods.freepca import FreePCA
from freespec.methods.freespec import FreeSpec
from freespec.methods.lvsa import LVSA
from freespec.methods.sliding_window import SlidingWindow
from freespec.methods.ultravico import UltraViCo

__all__ = [
    "FORMS",
    "LVSA",
    "METHODS",
    "SPLIT_BEFORE",
    "Branches",
    "Direct",
    "DirectFar",
    "FreeLOC",
    "FreeLong",
    "FreeLongPP",
    "FreeNoise",
    "FreePCA",
    "FreeSpec",
    "Grid",
    "Layer",
    "Method",
    "Mode",
    "Noise",
    "SlidingWindow",
    "StepPlan",
    "Tier",
    "UltraViCo",
    "describe_split",
    "find_method",
    "make_method",
]

METHODS: dict[str, type[Method]] = {
    "direct": Direct,
    "sliding_window": SlidingWindow,
    "freenoise": FreeNoise,
    "freelong": FreeLong,
    "freelong_pp": FreeLongPP,
    "freepca": FreePCA,
    "ultravico": UltraViCo,
    "lvsa": LVSA,
    "freeloc": FreeLOC,
    "freespec": FreeSpec,
}
# Other accepted names: forms of a method that comparisons leave out.
FORMS: dict[str, type[Method]] = {"direct_far": DirectFar}


def make_method(name: str, **settings: Any) -> Method:
    """The method called `name` with these settings; ValueError names the nearest valid word for an unknown one."""
    kind = find_method(name)
    known: list[str] = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for key, value in settings.items():
        if key == "split" and name in SPLIT_BEFORE:
            raise ValueError(f"method {name!r}: {describe_split(name, value, settings.get('domain', 'timestep'))}")
        if key not in known:
            what = f"has the settings {', '.join(known)}" if known else "has no settings"
            raise ValueError(f"method {name!r} does not know {key!r}{_nearest(key, known)}; it {what}")
    try:
        return kind(**settings)
    except ValueError:
        raise
    except Exception as error:  # a value of another type, or whatever a user's class raises
        raise ValueError(f"method {name!r} cannot be made: {_in_a_line(error)}") from error


# Methods whose `split`, in older versions, counted from clean video in these domains, and from noise in others.
SPLIT_BEFORE = {"freespec": ("timestep",), "freepca": ("timestep", "step")}


def describe_split(name: str, split: object, domain: str | None = None) -> str:
    """The settings equivalent to `split` of a method in SPLIT_BEFORE; for both domains if the domain is unknown."""
    text = "split is now fused_share, the share of the run that fuses, counted from noise"
    try:
        value = float(str(split))
    except ValueError:
        return text
    shares = {key: f"{1.0 - value if key in SPLIT_BEFORE[name] else value:.9g}" for key in ("timestep", "step")}
    if domain in shares or len(set(shares.values())) == 1:
        return f"{text}: fused_share {shares.get(domain or 'step')}"
    return f"{text}: fused_share {shares['timestep']} with domain timestep, {shares['step']} with domain step"


def find_method(name: str) -> type[Method]:
    """The class of a name in METHODS or FORMS, or of an import path `package.module:Class`; ValueError if there is none."""
    named = METHODS | FORMS
    if name in named:
        return named[name]
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise ValueError(
            f"unknown method {name!r}{_nearest(name, named)}; choose one of {', '.join(named)}, "
            "or a class of your own as package.module:Class"
        )
    module = _import(module_name, name)
    kind = getattr(module, class_name, None)
    if kind is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(f"method {name!r}: {module_name} has no {class_name!r}{_nearest(class_name, classes)}")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ValueError(f"method {name!r}: {class_name} is not a subclass of freespec.methods.Method")
    return kind


def _import(module_name: str, name: str) -> Any:
    """A user's module, from the path of Python or the working directory."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # `python launch/generate.py` searches the folder of the script, not the one it was started in
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"method {name!r}: cannot import {module_name!r} from {here} or Python's path: {error}"
        ) from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"method {name!r}: {module_name!r} does not import: {_in_a_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _in_a_line(error: BaseException) -> str:
    """An exception, and where in the user's code it was raised, in one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _nearest(word: str, words: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
