"""A miniature run of all stages: it trains, it resumes to the same bits, and its export is a working pipeline."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import LTXImageToVideoPipeline
from safetensors.torch import load_file

from tiny import state
from tiny.attention import cpu_attention
from tiny.export import export
from tiny.families import FAMILIES
from tiny.families.base import TEXT_LENGTH, assemble_pipeline, load_pipeline
from tiny.state import StagePlan, torch_rng
from tiny.train import STAGES, Plan, run_stage
from tiny.train_flow import flow_batch

VAE_PLAN = StagePlan(phases=((1, 1, 1), (5, 1, 1)), save_every=1)
FLOW_PLAN = StagePlan(phases=((1, 2, 1), (2, 2, 1)), save_every=1, compiled=False)
DECODER_PLAN = StagePlan(phases=((1, 1, 1), (1, 1, 1)), save_every=1)
PLAN = Plan(vae=VAE_PLAN, num_clips=2, clips_per_file=1, flow=FLOW_PLAN, decoder=DECODER_PLAN)
WITH_WEIGHTS = ("vae", "flow", "decoder")
CPU = torch.device("cpu")


# torch says that RMSNorm under autocast takes a slower path on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


class KilledError(Exception):
    """Stands for a run that was stopped from outside."""


def train_all(family, work, stages=STAGES):
    """All stages, as `tiny.train` runs them, at the smallest size."""
    for stage in stages:
        run_stage(stage, family, work, PLAN, CPU)


def killed_in(plan):
    """Stands in for `phase_at`, which every step calls first: ends the second step of the stage with this plan."""
    phase_at = state.phase_at

    def killed_at_step_one(phases, step):
        if phases == plan.phases and step == 1:
            raise KilledError
        return phase_at(phases, step)

    return killed_at_step_one


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def unbroken(family, tmp_path_factory):
    work = tmp_path_factory.mktemp("unbroken")
    train_all(family, work)
    return work


def test_a_resumed_run_has_the_same_bits(family, unbroken, tmp_path, monkeypatch):
    for plan in (VAE_PLAN, FLOW_PLAN, DECODER_PLAN):
        with monkeypatch.context() as patch:
            patch.setattr(state, "phase_at", killed_in(plan))
            with pytest.raises(KilledError):
                train_all(family, tmp_path)
    train_all(family, tmp_path)
    for stage in WITH_WEIGHTS:
        resumed, whole = (load_file(work / f"{stage}.safetensors") for work in (tmp_path, unbroken))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
        weights = [name for name in whole if name.startswith("weight.")]
        assert any(not torch.equal(whole[name], whole[name.replace("weight.", "ema.", 1)]) for name in weights)


def test_the_decoder_does_not_wait_for_the_transformer(family, unbroken, tmp_path):
    for made in unbroken.iterdir():  # the first two stages are the same ones in both orders
        if not made.name.startswith(("flow", "decoder")):
            shutil.copy2(made, tmp_path)
    train_all(family, tmp_path, stages=("vae", "latents", "decoder", "flow"))
    for stage in ("flow", "decoder"):
        early, late = (load_file(work / f"{stage}.safetensors") for work in (tmp_path, unbroken))
        assert all(torch.equal(early[name], late[name]) for name in late)


def test_the_last_stage_leaves_the_encoder_alone(family, unbroken):
    first, last = (load_file(unbroken / f"{stage}.safetensors") for stage in ("vae", "decoder"))
    names = [name for name in first if name.startswith("ema.")]
    changed = {name.split(".")[1] for name in names if not torch.equal(first[name], last[name])}
    everything = {name.split(".")[1] for name in names}
    assert changed == everything - set(family.encoder_parts) and "decoder" in changed


def test_the_export_is_a_pipeline(family, unbroken, tmp_path):
    target = tmp_path / "model"
    for _ in range(2):
        export(family, unbroken, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    pipe = load_pipeline(family, target)
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"}
    video = pipe("a red circle", **size, **family.sampling_arguments()).frames
    assert video.shape == (1, 5, 64, 64, 3)


def test_training_calls_the_model_as_the_pipeline_does(family):
    """Same text, same latents, same level: the first forward of the stock pipeline is the one that training learns."""
    torch.manual_seed(0)
    pipe = assemble_pipeline(family, family.build_vae(), family.build_denoiser(60))
    denoiser = family.build_denoiser(60)
    denoiser.transformer, denoiser.text_encoder = pipe.transformer, pipe.text_encoder
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, pipe.transformer.config.in_channels, 3, *family.latent_grid)
    packed = noise if family is FAMILIES["wan"] else noise.flatten(2).transpose(1, 2)
    arguments = {
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "output_type": "latent",
        **family.sampling_arguments(),
    }
    pipe("a red circle", height=64, width=64, num_frames=9, latents=packed, **arguments)
    hook.remove()

    tokens = pipe.tokenizer(["a red circle"], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad(), cpu_attention(CPU):
        text = denoiser.encode_text(tokens.input_ids, tokens.attention_mask, TEXT_LENGTH)
        mine = denoiser(noise, pipe.scheduler.timesteps[:1].float(), text)
        other = denoiser(noise, pipe.scheduler.timesteps[:1].float() / 2, text)
    stock = seen[0] if family is FAMILIES["wan"] else seen[0].transpose(1, 2).unflatten(2, noise.shape[2:])
    assert (mine - stock).norm() < 1e-5 * stock.norm()
    assert (other - stock).abs().max() > 1e-3


def test_a_given_first_frame_enters_as_in_the_image_pipeline():
    """The first forward of LTXImageToVideoPipeline is the one that training learns of a clip with a given first frame."""
    family = FAMILIES["ltx"]
    torch.manual_seed(0)
    text_pipe = assemble_pipeline(family, family.build_vae(), family.build_denoiser(60))
    pipe = LTXImageToVideoPipeline(**text_pipe.components)
    denoiser = family.build_denoiser(60)
    denoiser.transformer, denoiser.text_encoder = pipe.transformer, pipe.text_encoder
    torch.nn.init.normal_(pipe.transformer.proj_out.weight)
    calls = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs["hidden_states"], kwargs["timestep"], output[0])),
        with_kwargs=True,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(
        torch.rand(1, 3, 64, 64),
        "a red circle",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        **family.sampling_arguments(),
    )
    hook.remove()

    packed, times, stock = calls[0]
    latents, stock = (part.transpose(1, 2).unflatten(2, (3, *family.latent_grid)) for part in (packed, stock))
    levels = times.view(1, 3, -1)[:, :, 0].float()
    assert levels[0, 0] == 0 and (levels[0, 1:] > 0).all()
    tokens = pipe.tokenizer(["a red circle"], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad(), cpu_attention(CPU):
        text = denoiser.encode_text(tokens.input_ids, tokens.attention_mask, TEXT_LENGTH)
        mine = denoiser(latents, levels, text)
        other = denoiser(latents, levels[:, 1], text)
    assert (mine - stock).norm() < 1e-5 * stock.norm()
    assert (other - stock).abs().max() > 1e-3


def test_given_first_frames_are_clean_and_not_learned():
    latents = torch.randn(256, 2, 5, 1, 1)
    noisy, timestep, velocity, learned = flow_batch(latents, torch_rng(0), given_share=0.5)
    lengths = (~learned).sum(1)
    assert torch.equal(learned, torch.arange(5) >= lengths[:, None])
    counts = torch.bincount(lengths, minlength=6)
    # half none, a quarter one frame and a share of the rest, never all
    assert counts[0] > counts[1] > counts[2:5].max() and counts[1:5].min() > 0 and counts[5] == 0
    assert (timestep[~learned] == 0).all() and (timestep[learned] > 0).all()
    noisy, latents, velocity = (part.movedim(2, 1) for part in (noisy, latents, velocity))
    assert torch.equal(noisy[~learned], latents[~learned])
    # the noisy latents lie on the straight line from the clean ones along the velocity
    torch.testing.assert_close(noisy, latents + timestep[:, :, None, None, None] / 1000 * velocity)
    assert (noisy[learned] != latents[learned]).all()


def test_a_single_frame_is_never_given():
    _, timestep, _, learned = flow_batch(torch.randn(64, 2, 1, 1, 1), torch_rng(0), given_share=1.0)
    assert timestep.shape == (64,) and learned.all()


def test_a_training_begins_with_the_weights_of_a_checkpoint(family, unbroken, tmp_path):
    export(family, unbroken, tmp_path / "model")
    plan = Plan(
        vae=replace(VAE_PLAN, phases=((1, 1, 1),), lr=0.0),
        num_clips=1,
        clips_per_file=1,
        flow=replace(FLOW_PLAN, phases=((1, 1, 1),), lr=0.0),
    )
    for stage in ("vae", "latents", "flow"):
        run_stage(stage, family, tmp_path / "work", plan, CPU, begin=tmp_path / "model")
    for stage in ("vae", "flow"):
        begun = load_file(unbroken / f"{'decoder' if stage == 'vae' else stage}.safetensors")
        made = load_file(tmp_path / "work" / f"{stage}.safetensors")
        names = [name for name in made if name.startswith("weight.")]
        assert names
        for name in names:  # checkpoints hold the averages, in bfloat16
            average = begun[name.replace("weight.", "ema.", 1)].to(torch.bfloat16).float()
            torch.testing.assert_close(made[name], average, rtol=0, atol=0)
