"""Settings are read and checked without torch, which takes seconds to import: a mistake is answered at once."""

import subprocess
import sys

import pytest

from freespec import kernels
from freespec.kernel_names import FA3, NAMES

HEAVY = ("torch", "diffusers", "transformers", "numpy", "matplotlib")


def loaded_by(code: str) -> list[str]:
    """Which of HEAVY a fresh Python has loaded after `code`."""
    shown = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "module", ["engine", "engine.config", "engine.errors", "freespec", "freespec.methods", "launch.cli"]
)
def test_settings_need_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}") == []


def test_torch_would_be_seen() -> None:
    assert "torch" in loaded_by("from engine import apply_method")


def test_every_kernel_has_a_name() -> None:
    assert (*kernels.KERNELS, FA3) == NAMES
