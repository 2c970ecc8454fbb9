"""Previews: colours follow the decode, a fit finds a linear map, ranks write the same picture, and colours of another VAE are refused."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.config import MethodConfig, ModelConfig, OutputConfig, RunConfig, SamplerConfig, VideoConfig
from engine.decode.preview import Previewer, PreviewFactors, PreviewFit, find_factors, load_factors, vae_digest
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load.pipeline import load_vae_alone
from engine.paths import REPOSITORY
from engine.ranks.layouts import Ranks
from tests.engine.golden import mesh_of
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_wan, save_random_wan
from tiny import world

# The least correlation of colours that the embedded models' previews have with pixels.
LEAST = {"wan": 0.7, "ltx": 0.9}


def random_factors(pixels: int = 2, channels: int = 4, vae: str = "none") -> PreviewFactors:
    draw = torch.Generator().manual_seed(0)
    size = 3 * pixels * pixels
    weight, bias = torch.randn(channels, size, generator=draw) / 25, 0.4 + torch.rand(size, generator=draw) / 5
    return PreviewFactors(weight=weight, bias=bias, vae=vae)


@pytest.mark.parametrize("name", LEAST)
def test_colours_follow_the_decode(name: str) -> None:
    """On scenes of the world that no fit saw, encoded; colours of the wrong latents or channels are seen."""
    spec, vae = load_vae_alone(ModelConfig(path=str(REPOSITORY / "tiny" / name), device="cpu"))
    factors = find_factors(vae)
    assert factors is not None
    fit = PreviewFit(pixels=2, step=spec.temporal_factor)
    rng = np.random.default_rng(5)
    found, wanted, wrong = [], [], []
    for _ in range(3):
        frames = world.render(world.sample_scene(rng, held_out=True), 17)
        latents = encoded(vae, frames)
        cells = fit.targets(frames, latents.shape[2:])
        found.append(factors.colours(latents))
        wanted.append(
            PreviewFactors(weight=torch.eye(12), bias=torch.zeros(12), vae="").colours(cells.movedim(-1, 0).float())
        )
        wrong.append(factors.colours(latents.flip(0)))

    def correlation(colours: list[Tensor]) -> float:
        """Of each colour's differences from its mean, so that a picture of one colour has none."""
        pair = [torch.stack(each).flatten(0, -2) for each in (colours, wanted)]
        return float(np.corrcoef(*((each - each.mean(0)).flatten() for each in pair))[0, 1])

    assert correlation(found) > LEAST[name]
    assert correlation(wrong) < LEAST[name] / 2  # the negative control


def encoded(vae: Any, frames: np.ndarray) -> Tensor:
    """Normalised latents [z, F, h, w] of frames, as diffusers' own pipelines have them."""
    video = torch.from_numpy(frames).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(video.to(vae.dtype)).latent_dist.mode()[0].float()
    if "latents_mean" in vae.state_dict():  # LTX-Video
        mean, std = vae.latents_mean, vae.latents_std / vae.config.scaling_factor
    else:
        mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return (latents - mean[:, None, None, None]) / std[:, None, None, None]


def test_a_fit_finds_the_map_of_each_pixel() -> None:
    """At uneven sizes, against loops: a latent's colours are the means over its frames and pixels, and its pixels are where it is."""
    step, r, rows, columns = 4, 2, 3, 5
    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(1)
    frames = rng.integers(0, 256, (9, rows * 4, columns * 4, 3), np.uint8)
    fit = PreviewFit(pixels=r, step=step)
    cells = fit.targets(frames, (rows, columns))
    for f, y, x, i, j, c in itertools.product(range(3), range(rows), range(columns), range(r), range(r), range(3)):
        of_latent = frames[:1] if f == 0 else frames[1 + (f - 1) * step : 1 + f * step]
        top, left = 4 * y + 2 * i, 4 * x + 2 * j
        mean = of_latent[:, top : top + 2, left : left + 2, c].mean() / 255
        assert float(cells[f, y, x, (i * r + j) * 3 + c]) == pytest.approx(mean)

    true = random_factors()
    latents = torch.randn(4, 3, rows, columns, generator=draw)
    colours = true.colours(latents)
    y, x = 5, 8
    mapped = latents[:, 1, y // r, x // r] @ true.weight + true.bias
    torch.testing.assert_close(colours[1, y, x], mapped.reshape(r, r, 3)[y % r, x % r])
    exact = colours.repeat_interleave(2, 1).repeat_interleave(2, 2)
    many = torch.cat((exact[:1], exact[1:].repeat_interleave(step, 0))).clamp(0, 1)
    fit.add(latents, (many * 255).round().to(torch.uint8).numpy())
    found, share = fit.solve("digest")
    torch.testing.assert_close(found.weight, true.weight, rtol=0, atol=0.01)
    assert share > 0.99


CONFIG = {
    "video": VideoConfig(num_frames=13, height=32, width=48),
    "sampler": SamplerConfig(num_steps=3, guidance_scale=5.0, max_text_tokens=32),
    "method": MethodConfig(window_frames=3),
    "output": OutputConfig(progress="off"),
}


def pictures(rank: int, case: tuple[str, tuple[int, int, int] | None, str]) -> Tensor:
    """Make a video with previews every two steps in a folder; returns its latents."""
    folder, degrees, out = case
    preview = Previewer(factors=random_factors(), path=Path(out) / f"{rank}.webp", every=2, seconds=1.0)
    seen: list[int] = []

    def show(finished: int, *others: Any) -> None:
        preview(finished, *others)
        seen.extend([finished] * preview.path.exists())
        if finished == 2:
            preview.path.rename(preview.path.with_stem(f"{rank}-first"))

    ranks = None if degrees is None else Ranks(mesh=mesh_of(degrees))
    engine = LongVideoEngine(RunConfig(model=ModelConfig(path=folder, device="cpu"), **CONFIG), ranks)
    try:
        latents = engine.denoise("a red circle", preview=show).latents
    finally:
        engine.close()
    assert seen == ([2, 3] if rank == 0 else [])
    return latents


def test_ranks_write_the_picture_of_one(tmp_path: Path) -> None:
    """Only rank 0 does; the last estimate is the finished latents; another step's picture is another."""
    folder = str(save_random_wan(tmp_path / "wan"))
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        out.mkdir()
    latents = pictures(0, (folder, None, str(one)))
    run_ranks(2, pictures, [(folder, (1, 2, 1), str(two))], tmp_path)
    assert {path.name for path in two.iterdir()} == {"0.webp", "0-first.webp"}
    for name in ("0.webp", "0-first.webp"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / "0.webp").read_bytes() != (one / "0-first.webp").read_bytes()  # the negative control

    wanted = random_factors().colours(latents[0]).clamp(0, 1).mul(255).numpy()
    with Image.open(one / "0.webp") as picture:
        assert (picture.n_frames, picture.size) == (4, (24, 16))
        picture.seek(2)
        shown = np.asarray(picture.convert("RGB"))
    assert np.abs(shown.mean((0, 1)) - wanted[2].mean((0, 1))).max() < 12  # WebP's loss


def test_other_factors_are_refused(tmp_path: Path) -> None:
    vae, other = random_wan().vae, random_wan(seed=1).vae
    assert vae_digest(vae) == vae_digest(vae.to(torch.bfloat16)) != vae_digest(other)
    file = tmp_path / "a.safetensors"
    random_factors(vae=vae_digest(vae)).save(file, {})
    found = find_factors(vae, file)
    assert found is not None
    assert torch.equal(found.weight, random_factors().weight)
    assert find_factors(vae) is None  # nobody has fitted it
    with pytest.raises(UserError, match="fitted for another VAE"):
        find_factors(other, file)
    for wrong in (b"", file.read_bytes()[:-1]):
        file.write_bytes(wrong)
        with pytest.raises(UserError, match="holds no factors of a preview") as caught:
            load_factors(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        load_factors(tmp_path / "none.safetensors")
