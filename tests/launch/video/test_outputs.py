"""The files of a video, by the settings of its output."""

import pytest

from engine.config import OutputConfig
from engine.errors import UserError
from launch.video.outputs import plan_outputs


@pytest.mark.parametrize("kind", ["snapshot", "checkpoint"])
def test_latents_are_not_kept_under_the_name_of_a_snapshot(kind: str) -> None:
    """`checkpoint`: the name of older versions, whose file a run would take for its own."""
    with pytest.raises(UserError, match="is also another file of this video; choose another name"):
        plan_outputs(OutputConfig(path="a.mp4", save_latents=f"a.{kind}.safetensors"), 1)
    kept = plan_outputs(OutputConfig(path="a.mp4", save_latents=f"b.{kind}.safetensors"), 1)[0].latents
    assert kept.name == f"b.{kind}.safetensors"
