"""`sampler.cache`: the steps and latents of a plain loop without hooks, the same on any number of ranks, or refused."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LTXConditionPipeline, LTXImageToVideoPipeline, WanImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

import engine.hooks.step_cache
from engine.adapters.ltx import unpack
from engine.batch.identity import config_tree
from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.denoise.denoise import Denoised
from engine.denoise.snapshot import kept_steps
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.given.frames import GivenFrames, parse_given
from engine.hooks.in_force import hook_kinds
from engine.hooks.state import RunState
from engine.hooks.step_cache import relative_change, whole_sum
from engine.identity import latents_settings
from engine.load.convolutions import use_onednn
from engine.planner.cached import SCHEDULED, computed_steps
from engine.ranks.layouts import Ranks
from engine.spectra.trace import SpectralTrace
from freespec.methods import FreeSpec
from tests.engine.golden import PROMPT, TIMELINE, first_picture, mesh_of, on_one_rank, relative, stop_run
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_i2v, random_ltx, random_ti2v, random_wan, save_random_ltx, save_random_wan

STEPS = 12
ALL = slice(None)
WAN = {"num_frames": 29, "height": 80, "width": 48}
SIZES = {
    "ltx": {"num_frames": 41, "height": 64, "width": 96},
    "ti2v": {"num_frames": 29, "height": 64, "width": 96},
    "i2v": {"num_frames": 29, "height": 32, "width": 48},
}
RATIOS = tuple(1 - 0.002 * step for step in range(STEPS))
CACHES: dict[str, dict[str, Any]] = {
    "first_block": {"cache_threshold": 0.27},
    "mag": {"cache_ratios": RATIOS},
    "taylorseer": {},
}


def config_of(folder: str, cache: str = "none", method: str = "freespec", **sampler: Any) -> RunConfig:
    """A run of six dual steps and six local ones, of Wan 8 latent frames of 15 tokens; `folder` has the name of the model."""
    text = 512 if Path(folder).name == "i2v" else 20
    return RunConfig(
        model=ModelConfig(path=folder, device="cpu"),
        video=VideoConfig(**SIZES.get(Path(folder).name, WAN)),
        sampler=SamplerConfig(
            num_steps=STEPS, guidance_scale=4.0, max_text_tokens=text, cache=cache, **CACHES.get(cache, {}), **sampler
        ),
        method=MethodConfig(name=method, window_frames=3, freespec=FreeSpec(domain="step", fused_share=0.5)),
        output=OutputConfig(progress="off"),
    )


class PlainCache:
    """The forward of a Wan transformer, or of two, with a cache: decisions, residuals and predictions written out.

    One state per pass, emptied where the mode or the transformer changes; `forgets` is what empties it. Guidance calls it once for each
    pass, in turn; of two transformers the first has `first` steps. `steps` are the modes of the forwards, and whether they were cached.
    """

    def __init__(
        self, made: LongVideoEngine, *, forgets: tuple[str, ...] = ("mode", "transformer"), first: int = STEPS
    ) -> None:
        self.sampler, self.handle, self.forgets = made.config.sampler, made.handle, forgets
        self.states: dict[str, dict[str, Any]] = {"cond": {}, "uncond": {}}
        self.passes = itertools.cycle(self.states)
        self.calls, self.first = 0, first
        self.steps: list[tuple[str, bool]] = []
        for model in (made.pipe.transformer, made.pipe.transformer_2):
            if model is not None:
                model.forward = MethodType(self.forward, model)

    def forward(
        self,
        model: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        **_: Any,
    ) -> tuple[Tensor]:
        rotary = model.rope(hidden_states)
        x = model.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        time, change, text, _ = model.condition_embedder(timestep, encoder_hidden_states, None, timestep_seq_len=None)
        shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)

        def through(x: Tensor, layers: slice = ALL) -> Tensor:
            for block in model.blocks[layers]:
                x = block(x, text, change.unflatten(1, (6, -1)), rotary)
            return x

        def project(x: Tensor) -> Tensor:
            return model.proj_out((model.norm_out(x.float()) * (1 + scale) + shift).type_as(x))

        name, mode = next(self.passes), self.handle.state.last.mode
        step, self.calls = self.calls // 2, self.calls + 1
        begun = {"mode": mode, "transformer": step < self.first}
        if any(self.states[name].get(what) != begun[what] for what in self.forgets):
            self.states[name] = begun
        out, cached = getattr(self, self.sampler.cache)(self.states[name], step, x, through, project)
        self.steps.append((mode, cached))
        frames, rows, columns = (size // p for size, p in zip(hidden_states.shape[2:], (1, 2, 2), strict=True))
        out = out.reshape(1, frames, rows, columns, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return (out.flatten(6, 7).flatten(4, 5).flatten(2, 3),)

    def first_block(self, state: dict, _step: int, x: Tensor, through: Any, project: Any) -> Any:
        first = through(x, slice(1))
        residual, before = first - x, state.get("residual")
        if before is not None:
            change = (residual - before).double().abs().mean() / before.double().abs().mean()
            if change <= self.sampler.cache_threshold:
                return project(state["rest"] + first), True
        x = through(first, slice(1, None))
        state |= {"residual": residual, "rest": x - first}
        return project(x), False

    def mag(self, state: dict, step: int, x: Tensor, through: Any, project: Any) -> Any:
        since, own = (step, self.first) if step < self.first else (step - self.first, STEPS - self.first)
        if since >= round(0.2 * own):
            ratio = state.get("ratio", 1.0) * RATIOS[step]
            error, count = state.get("error", 0.0) + abs(1 - ratio), state.get("count", 0) + 1
            if "residual" in state and error <= 0.06 and count <= 3:
                state |= {"ratio": ratio, "error": error, "count": count}
                return project(x + state["residual"]), True
            state |= {"ratio": 1.0, "error": 0.0, "count": 0}
        out = through(x)
        state["residual"] = out - x
        return project(out), False

    def taylorseer(self, state: dict, step: int, x: Tensor, through: Any, project: Any) -> Any:
        since = step - state.setdefault("began", step)
        if since >= 3 and (since - 4) % 5:
            later = since - state["at"]
            return torch.zeros(()) + state["out"] + state["slope"] * later, True
        out = project(through(x))
        if "at" in state:
            state["slope"] = (out - state["out"]) / (since - state["at"])
        state |= {"out": out, "at": since}
        return out, False


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    random_wan(layers=3).save_pretrained(root / "wan", safe_serialization=True)
    save_random_ltx(root / "ltx")
    save_random_wan(root / "pair", experts=2)
    random_ti2v().save_pretrained(root / "ti2v")
    random_i2v().save_pretrained(root / "i2v")
    return {path.name: str(path) for path in root.iterdir()}


def made_by(config: RunConfig, ranks: Ranks | None = None, **options: Any) -> Denoised:
    with LongVideoEngine(config, ranks) as made:
        return made.denoise(PROMPT, **options)


def cached_steps(denoised: Denoised) -> list[tuple[str, bool]]:
    return [(row["mode"], row["cached"]) for row in denoised.steps]


def plain(config: RunConfig, **options: Any) -> tuple[Tensor, list[tuple[str, bool]]]:
    """Latents of `PlainCache`, and the steps of its conditional pass."""
    with LongVideoEngine(config) as made:
        cache = PlainCache(made, **options)
        made._cached = contextlib.nullcontext
        return made.denoise(PROMPT).latents, cache.steps[::2]


@pytest.mark.parametrize(("cache", "storage"), [*((cache, "full") for cache in CACHES), ("taylorseer", "fp8")])
def test_a_cache_makes_the_steps_and_latents_of_a_plain_loop(folders, cache, storage):
    """Negative controls: no cache, and a loop that uses what a dual step has left in a local one."""
    config = config_of(folders["wan"], cache)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, storage=storage))
    denoised = made_by(config)
    latents, steps = plain(config)
    assert cached_steps(denoised) == steps
    assert {("dual", True), ("local", True)} <= set(steps)
    assert steps[0] == ("dual", False)
    assert steps[STEPS // 2] == ("local", False)
    assert torch.equal(denoised.latents, latents)
    if storage == "full":
        assert relative(on_one_rank(config_of(folders["wan"])), latents) > 1e-3
        assert relative(plain(config, forgets=())[0], latents) > 1e-3


class RankCase(NamedTuple):
    model: str
    folder: str
    degrees: tuple[int, int, int]
    cache: str
    prompt: str = PROMPT
    picture: str | None = None

    @property
    def given(self) -> GivenFrames | None:
        return parse_given([f"first={self.picture}"] if self.picture else [], None)


def on_ranks(_rank: int, case: RankCase) -> tuple[Tensor, list[tuple[str, bool]], list[tuple[float, float]]]:
    """Latents, steps, and the change that each first block decided by, beside that of this rank's tokens alone."""
    changes = []

    def both(state: RunState, now: Tensor, before: Tensor) -> float:
        alone = float((now - before).double().abs().mean() / before.double().abs().mean())
        changes.append((relative_change(state, now, before), alone))
        return changes[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.hooks.step_cache, "relative_change", both)
        with LongVideoEngine(config_of(case.folder, case.cache), Ranks(mesh=mesh_of(case.degrees))) as made:
            denoised = made.denoise(case.prompt, given=case.given)
    return denoised.latents, cached_steps(denoised), changes


def picture_for(folder: str) -> str:
    """A picture of the size of the videos of `config_of`, beside the model."""
    video = config_of(folder).video
    return str(first_picture(Path(f"{folder}.png"), video.height, video.width).images[0].path)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As every rank has: another number of threads rounds the 512 tokens of a checkpoint of pictures otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_arrangement_of_ranks_decides_alike_and_makes_the_same_video(folders, ranks, tmp_path):
    """Negative control: by the tokens of one rank alone some would skip a step that others compute."""
    wan, ltx = folders["wan"], folders["ltx"]
    of_two = [
        RankCase("wan", wan, (1, 2, 1), "first_block"),
        RankCase("wan", wan, (2, 1, 1), "first_block"),
        RankCase("ltx", ltx, (2, 1, 1), "first_block"),
        RankCase("wan", wan, (1, 1, 2), "first_block", TIMELINE["wan"]),
        RankCase("wan", wan, (1, 1, 2), "mag"),
        *(
            RankCase(name, folders[name], degrees, "first_block", picture=picture_for(folders[name]))
            for name, degrees in (("ti2v", (1, 2, 1)), ("i2v", (1, 1, 2)))
        ),
    ]
    of_three = [RankCase("wan", wan, (1, 3, 1), cache) for cache in CACHES]
    cases = of_two if ranks == 2 else of_three
    apart = 0
    for case, by_rank in zip(cases, run_ranks(ranks, on_ranks, cases, tmp_path), strict=True):
        alone = made_by(config_of(case.folder, case.cache), given=case.given) if case.prompt == PROMPT else None
        (latents, steps, changes), *others = by_rank
        threshold = CACHES[case.cache].get("cache_threshold", 0)
        for other, _, theirs in others:
            assert torch.equal(other, latents), case
            apart += any((a > threshold) != (b > threshold) for (_, a), (_, b) in zip(changes, theirs, strict=True))
        assert any(cached for _, cached in steps), case
        if alone is None:
            continue
        assert steps == cached_steps(alone), case
        if case.model == "ltx" and case.degrees[0] == 2:  # rounded otherwise, see tests/engine/golden.py
            assert relative(latents, alone.latents) < 1e-4
        else:
            assert torch.equal(latents, alone.latents), case
    assert apart


def test_sums_have_the_same_bits_in_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1000, 48, generator=draw) * 10.0 ** torch.randint(-6, 3, (1, 1000, 1), generator=draw)
    shift = torch.tensor(62 - x.numel().bit_length()) - torch.frexp(x.abs().amax()).exponent
    cuts = [1000, 500, 333, 7]
    whole = {sum(int(whole_sum(part, shift)) for part in x.split(cut, dim=1)) for cut in cuts}
    assert len(whole) == 1
    assert whole.pop() * 2.0 ** -int(shift) == pytest.approx(float(x.double().abs().sum()), rel=1e-12)
    assert len({float(sum(part.abs().sum() for part in x.split(cut, dim=1))) for cut in cuts}) > 1  # of fp32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers' code with numpy 2
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        *((kind, cache) for kind in ("ti2v", "flf2v") for cache in CACHES),
        ("a14b", "mag"),
        ("ltx", "first_block"),
        *(("ltx condition", cache) for cache in CACHES),
    ],
    ids=lambda word: word,
)
def test_videos_of_pictures_are_those_of_the_stock_pipeline_with_the_same_cache(kind, cache, tmp_path, monkeypatch):
    """In `direct`, whose steps are all of one kind; one process decides by diffusers' own rule."""
    kind, _, condition = kind.partition(" ")
    pipe = {"ti2v": random_ti2v, "ltx": random_ltx}.get(kind, lambda: random_i2v(kind))()
    if condition:
        pipe = LTXConditionPipeline(**random_ltx(dynamic_shift=False, shift_terminal=None).components)
    pipe.save_pretrained(tmp_path / kind)
    stock = pipe
    if kind == "ti2v":
        stock = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    if kind == "ltx":
        stock = pipe if condition else LTXImageToVideoPipeline(**pipe.components)
        monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    stock.set_progress_bar_config(disable=True)
    use_onednn(stock.vae)  # the engine's convolutions on a CPU
    config = config_of(str(tmp_path / kind), cache, "direct")
    settings = {"cache_threshold": 0.12} if cache == "first_block" else {}
    sampler = dataclasses.replace(config.sampler, max_text_tokens=512, seed=3, **settings)
    size = {"num_frames": 17, "height": 64, "width": 96}
    places = ("first", "last") if kind in ("flf2v", "a14b") else ("first",)
    images = [first_picture(tmp_path / f"{place}.png", 64, 96, where=place).images[0] for place in places]
    config = dataclasses.replace(config, sampler=sampler, video=VideoConfig(**size))
    denoised = made_by(config, given=GivenFrames(images=tuple(images)))
    pictures = {name: Image.open(each.path) for name, each in zip(("image", "last_image"), images, strict=False)}
    call = {"prompt": PROMPT, "negative_prompt": sampler.negative_prompt, "num_inference_steps": STEPS}
    call |= {"frame_rate": config.video.fps, "max_sequence_length": 512} if kind == "ltx" else {}
    call |= {"image_cond_noise_scale": 0.0} if condition else {}

    def run() -> Tensor:
        draw = torch.Generator().manual_seed(3)
        made = stock(**call, **size, **pictures, guidance_scale=4.0, generator=draw, output_type="latent").frames
        return unpack(made, 3, 4, 6) if made.dim() == 3 else made

    plain = run()
    experts = [row.get("expert", "transformer") for row in denoised.steps]
    for part in sorted(set(experts)):
        own = [step for step, expert in enumerate(experts) if expert == part]
        getattr(stock, part).enable_cache(engine.hooks.step_cache.cache_config(sampler, own))
    assert torch.equal(denoised.latents, run())
    assert 0 < sum(cached for _, cached in cached_steps(denoised)) < STEPS - 1
    assert relative(plain, denoised.latents) > 1e-3  # negative control


@pytest.mark.parametrize("cache", CACHES)
def test_each_of_two_transformers_has_its_own_steps(folders, cache, monkeypatch):
    """The first has four dual steps, the second two and six local ones; its ratios are those of its steps.

    Negative controls: no cache, and a loop in which the second one goes on with what the first has left.
    """
    config = config_of(folders["pair"], cache)
    if cache == "first_block":  # by this threshold the second one would go on, whatever its first block does
        config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, cache_threshold=10.0))
    denoised = made_by(config)
    experts = [row["expert"] for row in denoised.steps]
    assert experts == ["transformer"] * 4 + ["transformer_2"] * 8
    latents, steps = plain(config, first=4)
    assert cached_steps(denoised) == steps
    if cache in SCHEDULED:
        planned = computed_steps(config.sampler, experts, [mode for mode, _ in steps])
        assert planned == [not cached for _, cached in steps]
    assert not steps[4][1]
    assert any(cached for _, cached in steps[:4])
    assert any(cached for _, cached in steps[5:])
    assert torch.equal(denoised.latents, latents)
    assert relative(on_one_rank(config_of(folders["pair"])), latents) > 1e-3
    monkeypatch.setattr("engine.hooks.step_hook.skips_layers", lambda _: True)  # or it refuses such a first step
    assert relative(plain(config, forgets=("mode",))[0], latents) > 1e-3


def test_a_user_s_cache_of_dual_steps_is_not_used_in_local_ones_either(folders):
    config = config_of(folders["wan"], "first_block")
    with LongVideoEngine(config_of(folders["wan"])) as made:
        made.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=CACHES["first_block"]["cache_threshold"]))
        assert torch.equal(made.denoise(PROMPT).latents, made_by(config).latents)
        made.config = config
        with pytest.raises(UserError, match=r"sampler\.cache first_block: the transformer has a cache already"):
            made.denoise(PROMPT)


def test_after_a_run_the_pipeline_has_no_cache(folders):
    none, config = config_of(folders["wan"]), config_of(folders["wan"], "mag")
    with LongVideoEngine(config) as made:
        first = made.denoise(PROMPT)
        assert not made.pipe.transformer.is_cache_enabled
        assert hook_kinds(made.pipe.transformer) == set()
        made.config = none
        bare = made.denoise(PROMPT)
        made.config = config
        assert torch.equal(made.denoise(PROMPT).latents, first.latents)
    assert torch.equal(bare.latents, on_one_rank(none))
    assert "cached" not in bare.steps[0]


def test_only_finished_latents_are_saved(folders, tmp_path):
    """What a cache keeps is not in the state of a run, which could not go on with the same bits."""
    path = tmp_path / "run.safetensors"
    with LongVideoEngine(config_of(folders["wan"], "mag")) as made:
        stop_run(made, path)
        assert not path.exists()
        whole = made.denoise(PROMPT, snapshot=path, snapshot_every=2)
        assert kept_steps(path) == STEPS
        again = made.denoise(PROMPT, snapshot=path)
    assert again.resumed_at == STEPS
    assert torch.equal(again.latents, whole.latents)
    with LongVideoEngine(config_of(folders["wan"])) as made:
        with pytest.raises(UserError, match=r"belongs to another run .*sampler\.cache was 'mag', now unset"):
            made.denoise(PROMPT, snapshot=path)
        stop_run(made, tmp_path / "bare.safetensors")  # negative control
        assert kept_steps(tmp_path / "bare.safetensors") == 2


def ids(config: RunConfig) -> tuple[str, str]:
    given = {"checkpoint": "c", "dtype": "d"}
    return str(latents_settings(config, device="cpu", with_rate=False, **given)), str(config_tree(config, **given))


def test_ids_name_the_cache_and_stay_without_one() -> None:
    none = config_of("x")
    assert not any("cache" in text for text in ids(none))
    named = config_of("x", "mag")
    assert ids(dataclasses.replace(named, sampler=dataclasses.replace(named.sampler, cache_threshold=0.06))) == ids(
        named
    )
    others = [config_of("x", cache) for cache in CACHES]
    others += [dataclasses.replace(named, sampler=dataclasses.replace(named.sampler, cache_threshold=0.1))]
    assert len({ids(config) for config in (none, *others)}) == 5


def test_another_cache_takes_its_own_defaults() -> None:
    def other(**sampler: Any) -> SamplerConfig:
        return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, **sampler)).sampler

    config = config_of("x", "taylorseer")
    assert config.sampler.cache_settings == {"cache_interval": 5}
    assert other(cache="mag", cache_ratios=RATIOS).cache_settings == {"cache_threshold": 0.06, "cache_ratios": RATIOS}
    assert other(cache="first_block").cache_settings == {"cache_threshold": 0.05}
    assert other(cache="none") == config_of("x").sampler
    with pytest.raises(UserError, match=r"sampler\.cache_interval is for sampler\.cache taylorseer"):  # given by a user
        dataclasses.replace(config.sampler, cache="none", cache_interval=4)


SAMPLER = {
    "sampler.cache_threshold is for sampler.cache first_block, mag, and sampler.cache is none": {
        "cache_threshold": 0.1
    },
    "sampler.cache_interval is for sampler.cache taylorseer, and": {"cache": "first_block", "cache_interval": 3},
    "sampler.cache_threshold must be more than 0, got nan": {"cache": "first_block", "cache_threshold": math.nan},
    "sampler.cache_interval must be 2 or more steps, got 1": {"cache": "taylorseer", "cache_interval": 1},
    "sampler.cache mag needs sampler.cache_ratios": {"cache": "mag"},
    "sampler.cache_ratios has 3 ratios for 2 steps": {"cache": "mag", "cache_ratios": (1.0,) * 3, "num_steps": 2},
    "sampler.cache_ratios must be more than 0, got -1": {"cache": "mag", "cache_ratios": (1.0, -1.0)},
}
RUN = {
    "sampler.cache mag decides between blocks, which model.compile": {"model": {"compile": True}},
    "sampler.cache mag skips blocks, and model.weights zero3 fetches": {"model": {"weights": "zero3"}},
    "sampler.cache mag skips blocks, and model.weights block_offload": {"model": {"weights": "block_offload"}},
    "sampler.cache mag skips layers, which have no branches": {"output": {"trace": True}},
}


@pytest.mark.parametrize("told", [*SAMPLER, *RUN])
def test_what_a_cache_excludes_is_one_line(told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        if told in SAMPLER:
            SamplerConfig(**SAMPLER[told])
        else:
            config = config_of("x", "mag")
            [(group, settings)] = RUN[told].items()
            dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **settings)})
    assert "\n" not in str(caught.value)


def test_a_trace_of_a_call_is_refused(folders):
    with LongVideoEngine(config_of(folders["wan"], "mag")) as made:
        with pytest.raises(UserError, match="skips layers"):
            made.denoise(PROMPT, trace=SpectralTrace())


def test_plans_add_errors_of_mag_in_float32_as_diffusers_does():
    """In float64 1 - 0.98 is above 0.02, and no step would be skipped; MagCache's hook skips one of every two after a fifth of the steps."""
    sampler = SamplerConfig(num_steps=50, cache="mag", cache_ratios=(0.98,) * 50, cache_threshold=0.02)
    planned = computed_steps(sampler, [""] * 50, [""] * 50)
    assert planned == [step < 10 or step % 2 == 1 for step in range(50)]
