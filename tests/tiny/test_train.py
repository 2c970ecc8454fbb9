"""A miniature run of all stages: it trains, it resumes to the same bits, and its export is a working pipeline."""

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from tiny import train_flow, train_vae
from tiny.export import export
from tiny.latents import cache_latents
from tiny.train_flow import FlowPlan
from tiny.train_vae import VaePlan

VAE_PLAN = VaePlan(phases=((1, 1, 1), (5, 1, 1)), save_every=1)
FLOW_PLAN = FlowPlan(phases=((1, 2, 1), (2, 2, 1)), save_every=1, compiled=False)
DECODER_PLAN = VaePlan(phases=((1, 1, 1), (1, 1, 1)), save_every=1)
STAGES = ("vae", "flow", "decoder")
CPU = torch.device("cpu")


# torch says that RMSNorm under autocast takes a slower path on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


class KilledError(Exception):
    """Stands for a run that was stopped from outside."""


def train_all(work):
    """All stages, as `tiny.train` runs them, at the smallest size."""
    work.mkdir(exist_ok=True)
    train_vae.train_vae(work, VAE_PLAN, CPU)
    cache_latents(work, num_clips=2, clips_per_file=1, device=CPU)
    train_flow.train_flow(work, FLOW_PLAN, CPU)
    train_vae.train_decoder(work, DECODER_PLAN, CPU)


def killed_at_step_one(phases, step):
    """Stands in for `phase_at`, which every step calls first."""
    if step == 1:
        raise KilledError
    return phases[0][:2]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    work = tmp_path_factory.mktemp("unbroken")
    train_all(work)
    return work


def test_a_resumed_run_has_the_same_bits(unbroken, tmp_path, monkeypatch):
    for module in (train_vae, train_flow, train_vae):
        with monkeypatch.context() as patch:
            patch.setattr(module, "phase_at", killed_at_step_one)
            with pytest.raises(KilledError):
                train_all(tmp_path)
    train_all(tmp_path)
    for stage in STAGES:
        resumed, whole = (load_file(work / f"{stage}.safetensors") for work in (tmp_path, unbroken))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        weights = [name for name in whole if name.startswith("weight.")]
        assert any(not torch.equal(whole[name], whole[name.replace("weight.", "ema.", 1)]) for name in weights)


def test_the_last_stage_leaves_the_encoder_alone(unbroken):
    first, last = (load_file(unbroken / f"{stage}.safetensors") for stage in ("vae", "decoder"))
    names = [name for name in first if name.startswith("ema.")]
    changed = {name.split(".")[1] for name in names if not torch.equal(first[name], last[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_export_is_a_pipeline(unbroken, tmp_path):
    target = tmp_path / "wan"
    for _ in range(2):
        export(unbroken, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wan"]
    pipe = WanPipeline.from_pretrained(str(target), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    video = pipe(
        "a red circle", height=64, width=64, num_frames=5, num_inference_steps=1, max_sequence_length=32
    ).frames
    assert video.shape == (1, 5, 64, 64, 3)
