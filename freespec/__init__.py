"""FreeSpec as pure functions on tensors: windows, attention branches, spectra and their fusion. Knows no ranks, models or files.

Methods are settings too, and a command line checks settings without importing torch: what methods compute with is imported when
it is first used, as `freespec.spectrum` and so on.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freespec import components, kernels, lowpass, schedule, spectrum, views

__all__ = ["components", "kernels", "lowpass", "schedule", "spectrum", "views"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"freespec.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
