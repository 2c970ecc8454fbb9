"""The message of a comparison whose video cannot be made."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.batch.files import ItemFiles
from engine.errors import UserError
from launch.video.interruptions import explain_denoising


def test_memory_that_runs_out_is_not_answered_with_what_the_folder_refuses(tmp_path: Path) -> None:
    engine = cast("Any", SimpleNamespace(device="cpu", is_first=True))
    files = ItemFiles(folder=tmp_path, name="p0000-s0")
    with pytest.raises(UserError) as told, explain_denoising(files, engine, doing="making a video"):
        raise MemoryError
    assert str(told.value) == (
        "out of memory while making a video on cpu (MemoryError); more ranks or --model.weights cpu_offload (on several ranks "
        "zero3) would fit; in another folder also --decode.mode tiled, or a shorter or smaller video"
    )
