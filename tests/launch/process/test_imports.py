"""Garbage collection rests while torch is imported, and only then."""

import gc
import subprocess
import sys

import torch

from launch.process.imports import uncollected
from tests.test_layering import ROOT


def test_nothing_is_collected_while_a_process_imports() -> None:
    code = (
        "import gc; from launch.process.imports import uncollected\n"
        "with uncollected(): print(gc.isenabled()); import decimal\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True", "True"]


def test_a_process_that_has_torch_goes_on_collecting() -> None:
    """Garbage of what has run in it before would stay for ever."""
    assert torch.__name__ in sys.modules
    before = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
