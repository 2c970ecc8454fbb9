"""FreeSpec as pure functions on tensors: windows, attention branches, spectra and their fusion. Knows no ranks, models or files.

Methods are also settings, which a command line checks without importing torch: submodules such as `freespec.spectrum` are imported on
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from freespec import components, decay, kernels, lowpass, schedule, spectrum, views

__version__ = "0.1.0"
__all__ = ["components", "decay", "kernels", "lowpass", "schedule", "spectrum", "views"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"freespec.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
