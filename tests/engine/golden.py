"""What the golden tests share: a video on one rank, what another order of sums does to it, and the same on many ranks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import engine.kernel_choice
from engine.config import RunConfig
from engine.engine import LongVideoEngine
from engine.given.frames import GivenFrames, GivenImage
from engine.load.pipeline import load_pipeline
from engine.ranks.layouts import Ranks
from freespec.attention import merge
from freespec.kernels import Kernel
from parallel.mesh import SeqMesh, build_mesh
from tests.ranks import PATIENCE

PROMPT = "a red circle"
PRESETS = Path(__file__).parents[2] / "configs" / "ablation"
# Every transition, with boundaries inside a shard and inside the frames of the video that one latent frame holds.
TIMELINE = {
    "wan": "a red circle [0-8] | a star [8-13, cut] | a square [13-18, scene] | a star [18-22, fade 5] | a circle [22-, relay 5]",
    "ltx": "a red circle [0-16] | a star [16-25, cut] | a square [25-34, scene] | a star [34-41, fade 9] | a circle [41-, relay 9]",
}
# Ranks may add so many times what rounding does to `direct` on one rank.
LIMIT = 3
Degrees = tuple[int, int, int]


class Case(NamedTuple):
    """One arrangement of the ranks, one method (or "METHOD+riflex", or "freespec:PRESET"), and what is broken on purpose."""

    folder: str
    degrees: Degrees
    method: str
    route: str = "auto"
    fault: str = ""
    prompt: str = PROMPT


def all_degrees(ranks: int) -> list[Degrees]:
    """Every cfg x ring x ulysses of so many ranks."""
    return [
        (cfg, ring, ranks // cfg // ring)
        for cfg in (1, 2)
        for ring in range(1, ranks + 1)
        if ranks % cfg == 0 and ranks // cfg % ring == 0
    ]


@functools.cache
def mesh_of(degrees: Degrees) -> SeqMesh:
    """The mesh of a rank that runs many cases."""
    cfg, ring, ulysses = degrees
    return build_mesh(cfg=cfg, ring=ring, ulysses=ulysses, device=torch.device("cpu"), timeout=PATIENCE)


def latents_of(
    config: RunConfig, ranks: Ranks | None = None, prompt: str = PROMPT, given: GivenFrames | None = None
) -> Tensor:
    """This rank's latents, or those of a process alone, from a pipeline that all cases of this process share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine, "load_pipeline", _load_once)
        made = LongVideoEngine(config, ranks)
    try:
        return made.denoise(prompt, given=given).latents
    finally:
        made.close()


def stop_run(engine: LongVideoEngine, snapshot: Path, *, after: int = 2, given: GivenFrames | None = None) -> None:
    """Leave the snapshot of a run that is interrupted after so many steps."""

    def stop(finished: int, _total: int) -> None:
        if finished == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.denoise(PROMPT, given=given, snapshot=snapshot, on_step=stop)


_load_once = functools.cache(load_pipeline)


def first_picture(path: Path, height: int, width: int, *, where: str = "first", seed: int = 0) -> GivenFrames:
    """A random picture in a file, given at the first frame or elsewhere."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return GivenFrames(images=(GivenImage(where=where, path=path),))


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, in norms of `b`."""
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


def attend_in_chunks(kernel: Kernel) -> Kernel:
    """The same kernel with the keys in three parts: what another order of sums does to a run on one rank."""

    def chunked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [x for x in zip(k.tensor_split(3, dim=2), v.tensor_split(3, dim=2), strict=True) if x[0].shape[2]]
        out, lse = (x.transpose(1, 2) for x in kernel(q, *parts[0]))
        for part in parts[1:]:
            out, lse = merge(out, lse, *(x.transpose(1, 2) for x in kernel(q, *part)))
        return out.transpose(1, 2), lse.transpose(1, 2)

    return chunked


@functools.cache
def on_one_rank(config: RunConfig, prompt: str = PROMPT, given: GivenFrames | None = None) -> Tensor:
    """The latents of a process alone."""
    return latents_of(config, prompt=prompt, given=given)


@contextmanager
def keys_in_three_chunks() -> Iterator[None]:
    """Engines that are made inside attend to their keys in three chunks."""
    select: Callable[..., Kernel] = engine.kernel_choice.select_kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.kernel_choice.select_kernel", lambda *arguments: attend_in_chunks(select(*arguments)))
        yield


def with_method(config: RunConfig, name: str) -> RunConfig:
    """The same run with another method; `freespec:gb` is a preset of configs/ablation over the run's own settings."""
    name, _, preset = name.partition(":")
    method = dataclasses.replace(config.method, name=name)
    if preset:
        tree = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
        method = dataclasses.replace(
            method, freespec=dataclasses.replace(method.freespec, **tree["method"]["freespec"])
        )
    return dataclasses.replace(config, method=method)


@functools.cache
def rounding_of_direct(config: RunConfig, prompt: str = PROMPT) -> float:
    """Relative change of the latents of `direct` on one rank when each attention call takes its keys in three chunks."""
    config = with_method(config, "direct")
    with keys_in_three_chunks():
        latents = latents_of(config, prompt=prompt)
    return relative(latents, on_one_rank(config, prompt))


def assert_same_video(
    by_rank: Sequence[Tensor], config: RunConfig, case: Case, given: GivenFrames | None = None
) -> None:
    """Every rank has the whole video, and it has the bits of one rank's.

    LTX-Video runs both passes of guidance as a batch of two, and with cfg 2 one on each rank, whose few rows of time embeddings a
    CPU multiplies by other kernels: there it differs by at most LIMIT times what rounding does to direct.
    """
    for latents in by_rank[1:]:
        assert torch.equal(latents, by_rank[0]), case
    alone = on_one_rank(config, case.prompt, given)
    error = relative(by_rank[0], alone)
    if Path(case.folder).name.startswith("ltx") and case.degrees[0] == 2:
        assert error <= LIMIT * rounding_of_direct(config, case.prompt), (case, error)
    else:
        assert torch.equal(by_rank[0], alone), (case, error)
