"""The initial noise as a setting: a method's default, the configuration's override, and the record."""

import contextlib
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest
import torch

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.denoise.noise import draw_noise
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.identity import settings_id
from freespec.methods import METHODS, Direct, FreeNoise, FreeSpec
from tests.tiny_pipelines import save_random_wan

PUBLISHED = {
    "direct": "iid",
    "sliding_window": "iid",
    "freenoise": "freenoise",
    "freelong": "freenoise",
    "freepca": "mean_reuse",
    "ultravico": "iid",
    "lvsa": "iid",
    "freeloc": "iid",
    "freelong_pp": "freenoise",
    "freespec": "iid",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def config_of(folder: Path | str, method: str, *, stride: int | None = None, **sampler: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), device="cpu"),
        video=VideoConfig(num_frames=29, height=32, width=32),
        sampler=SamplerConfig(num_steps=1, guidance_scale=1.0, seed=3, max_text_tokens=20, **sampler),
        method=MethodConfig(name=method, window_frames=4, freenoise=FreeNoise(stride=stride)),
        output=OutputConfig(progress="off"),
    )


def test_every_method_has_the_noise_that_it_was_published_with() -> None:
    assert {name: config_of("", name).noise[0] for name in METHODS} == PUBLISHED
    assert config_of("", "freenoise", noise="iid").noise == ("iid", 1)  # a quarter of 4 frames
    assert config_of("", "direct", noise="freenoise", noise_stride=3).noise == ("freenoise", 3)


@pytest.mark.parametrize(("window", "stride"), [(21, 5), (16, 4)])
def test_without_a_stride_it_is_a_quarter_of_the_window(window: int, stride: int) -> None:
    config = config_of("", "direct", noise="freenoise")
    assert replace(config, method=replace(config.method, window_frames=window)).noise == ("freenoise", stride)


def test_the_noise_has_the_method_s_stride_as_published() -> None:
    assert config_of("", "freenoise", stride=3).noise == ("freenoise", 3)
    assert config_of("", "freenoise", stride=3, noise_stride=2).noise == ("freenoise", 2)
    # Asked for by name, it is the same for every method.
    assert config_of("", "freenoise", stride=3, noise="freenoise").noise == ("freenoise", 1)
    assert config_of("", "freelong", stride=3).noise == ("freenoise", 1)  # a setting of another method


def test_a_draw_of_another_kind_begins_with_the_same_frames() -> None:
    shape = (1, 4, 11, 2, 2)
    plain = draw_noise(shape, 5)
    for kind in ("freenoise", "mean_reuse"):
        made = draw_noise(shape, 5, kind, window_frames=4, stride=2)
        assert torch.equal(made, draw_noise(shape, 5, kind, window_frames=4, stride=2))
        assert torch.equal(made[:, :, :4], plain[:, :, :4])
        assert not torch.equal(made, plain)
        assert torch.equal(draw_noise(shape, 5, kind, window_frames=11, stride=2), plain)


def test_the_order_of_the_frames_is_the_seed_s() -> None:
    def order(seed: int) -> tuple[int, ...]:
        noise = draw_noise((1, 1, 16, 8, 8), seed, "freenoise", window_frames=8, stride=8)
        return tuple(int((noise[:, :, :8] - noise[:, :, [t]]).abs().amax((0, 1, 3, 4)).argmin()) for t in range(8, 16))

    orders = [order(seed) for seed in range(8)]
    assert all(sorted(each) == [*range(8)] for each in orders)
    assert len(set(orders)) == 8


def run_id_of(engine: LongVideoEngine, **call: object) -> str:
    """The id of a run of this engine."""
    return settings_id(engine.checkpoint.settings(engine.config, **call))


@pytest.mark.parametrize("noise", ["iid", "freenoise", "mean_reuse"])
def test_an_engine_s_first_latents_are_the_draw_of_its_window_and_stride(folder: Path, noise: str) -> None:
    config = config_of(folder, "freenoise", noise=noise, noise_stride=2 if noise == "freenoise" else None)
    seeds = range(4)  # one alone may happen to have the same order with another stride
    with contextlib.closing(LongVideoEngine(config)) as made:
        found = [made._draw_noise(29, torch.Generator("cpu").manual_seed(seed)) for seed in seeds]

    def equal(**settings: int) -> bool:
        pairs = zip(seeds, found, strict=True)
        return all(torch.equal(it, draw_noise(tuple(it.shape), seed, noise, **settings)) for seed, it in pairs)

    assert equal(window_frames=4, stride=2)
    assert equal(window_frames=5, stride=2) == (noise == "iid")
    assert equal(window_frames=4, stride=1) == (noise != "freenoise")


def test_a_run_starts_from_the_noise_of_the_setting_and_says_so(folder: Path) -> None:
    latents, ids = {}, set()
    for noise in ("method", "iid", "freenoise", "mean_reuse"):
        made = LongVideoEngine(config_of(folder, "direct", noise=noise))
        result = made.generate("a red circle")
        assert result.record["noise"] == {"kind": "iid" if noise == "method" else noise, "stride": 1}
        ids.add(run_id_of(made, prompt="a red circle"))
        latents[noise] = result.latents
        made.close()
    assert torch.equal(latents["method"], latents["iid"])
    assert len(ids) == 4
    for noise in ("freenoise", "mean_reuse"):
        assert not torch.equal(latents[noise], latents["iid"])
    assert not torch.equal(latents["freenoise"], latents["mean_reuse"])


def test_a_snapshot_of_another_noise_is_refused(folder: Path) -> None:
    """The run id is the file's: method and setting together decide it, since the method alone may bring the noise."""
    ids = []
    for config in (
        config_of(folder, "freenoise"),
        config_of(folder, "freenoise", noise="freenoise", noise_stride=2),
        config_of(folder, "freenoise", stride=2),
    ):
        made = LongVideoEngine(config)
        ids.append(run_id_of(made))
        made.close()
    assert len(set(ids)) == 3


@dataclass(frozen=True, kw_only=True)
class Dated(Direct):
    """A class of the user's own, with a default that JSON does not know."""

    since: date = date(2026, 1, 1)
    alpha: float = 1.0


def test_a_snapshot_is_refused_for_settings_of_the_method_in_use_only(folder: Path) -> None:
    with contextlib.closing(LongVideoEngine(config_of(folder, "freespec"))) as made:

        def run_id(name: str, **settings: object) -> str:
            made.use_method(MethodConfig(name=name, window_frames=4, **settings))
            return run_id_of(made, seed=3)

        own = f"{__name__}:Dated"
        assert run_id("freespec", freenoise=FreeNoise(stride=2)) == run_id("freespec")
        assert run_id("freespec", freespec=FreeSpec(alpha=1.0)) != run_id("freespec")
        assert run_id("direct", freespec=FreeSpec(alpha=1.0)) == run_id("direct")
        assert run_id(own, freespec=FreeSpec(alpha=1.0)) == run_id(own, settings={"alpha": 1.0}) == run_id(own)
        assert run_id(own, settings={"alpha": 2.0}) != run_id(own)
        assert len({run_id(name) for name in ("freespec", "direct", own)}) == 3


@dataclass(frozen=True, kw_only=True)
class Hopping(FreeNoise):
    """A user's class with a noise stride that is not a setting."""

    hop: int = 6

    @property
    def noise_stride(self) -> int:
        return self.hop


def test_mistakes() -> None:
    with pytest.raises(
        UserError, match=r"noise_stride of .*:Hopping 6 is more than the 4 frames of method.window_frames"
    ):
        config_of("", f"{__name__}:Hopping")
    with pytest.raises(UserError, match=r"sampler.noise_stride must be 1 or more frames, got 0"):
        config_of("", "direct", noise_stride=0)
    with pytest.raises(UserError, match=r"sampler.noise_stride 5 is more than the 4 frames of method.window_frames"):
        config_of("", "freenoise", noise_stride=5)
    with pytest.raises(
        UserError, match=r"sampler.noise_stride 2 requires sampler.noise freenoise, and sampler.noise is iid"
    ):
        config_of("", "freenoise", noise="iid", noise_stride=2)
    window = FreeNoise(stride=6, attention="window")  # its attention has no stride, and its noise cannot have this one
    with pytest.raises(UserError, match=r"method.freenoise.stride 6 is more than the 4 frames of method.window_frames"):
        replace(config_of("", "freenoise"), method=MethodConfig(name="freenoise", window_frames=4, freenoise=window))
    assert replace(config_of("", "direct", noise_stride=5)).noise == ("iid", 5)  # not read, so no mistake
