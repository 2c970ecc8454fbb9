"""Every preset through the whole command on one rank and four, with a small random model of the classes that it names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline

from engine import read_preset
from engine.config import RunConfig
from engine.media.read_video import count_frames
from tests.engine.golden import first_picture, relative
from tests.launch.forked import run_forked
from tests.launch.test_ranks import latents_of
from tests.loras import random_lora, save_lora
from tests.original_layout import ltx_transformer, ltx_vae
from tests.tiny_pipelines import random_i2v, random_ltx, random_ltx_vae_095, random_ti2v, random_wan, random_wan22

ROOT = Path(__file__).parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
RANKS = 4


class Small(NamedTuple):
    """A small model: its classes, the size of its video of 8 latent frames, and the places of the pictures it is given."""

    make: Callable[[], DiffusionPipeline]
    size: tuple[int, int, int]
    pictures: tuple[str, ...] = ()


def random_ltx_condition() -> DiffusionPipeline:
    """As 0.9.5 and later: their VAE, and a shift that is fixed."""
    pipe = random_ltx(dynamic_shift=False, shift_terminal=None)
    pipe.register_modules(vae=random_ltx_vae_095())
    return pipe


def as_condition(folder: Path) -> None:
    """Name the pipeline whose checkpoints were trained with conditions."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "LTXConditionPipeline"}))


WAN, TI2V, LTX = (29, 32, 48), (29, 64, 96), (57, 64, 96)
# By what the names of presets begin with; the longest that fits counts.
MODELS = {
    "wan2.1-t2v": Small(random_wan, WAN),
    "wan2.1-i2v": Small(lambda: random_i2v("i2v"), WAN, ("first",)),
    "wan2.1-flf2v": Small(lambda: random_i2v("flf2v"), WAN, ("first", "last")),
    "wan2.2-t2v": Small(random_wan22, WAN),
    "wan2.2-i2v": Small(lambda: random_i2v("a14b"), WAN, ("first",)),
    "wan2.2-ti2v": Small(random_ti2v, TI2V, ("first",)),
    "ltx-video-2b": Small(random_ltx, LTX),
    "ltx-video-2b-0.9.8": Small(random_ltx_condition, LTX),
    "ltx-video-13b": Small(random_ltx_condition, LTX, ("first", "last")),
}


def words_of(preset: str, folder: Path) -> list[str]:
    """Options that put a small model, its sizes and few steps in place of the preset's; all else stays the preset's."""
    config = read_preset(preset)
    settings: dict[str, object] = {"sampler.num_steps": 2} if config.sampler.levels is None else {}
    if config.method.freespec.domain != "step":  # by timestep all of so few steps would fuse
        settings["method.freespec.domain"] = "step"
    if preset.startswith("tiny-"):  # the model is small, and 129 frames of it are not
        return [f"--{key}={value}" for key, value in ({"video.num_frames": 65} | settings).items()]
    small = MODELS[max((name for name in MODELS if preset.startswith(name)), key=len)]
    pipe, (frames, height, width) = small.make(), small.size
    pipe.save_pretrained(folder / "model")
    if preset.startswith("ltx-video-13b"):
        as_condition(folder / "model")
    settings |= {"model.path": folder / "model", "method.window_frames": 3}
    settings |= {"video.num_frames": frames, "video.height": height, "video.width": width}
    settings |= small_files(config, pipe, folder)
    given = [first_picture(folder / f"{place}.png", height, width, where=place).images[0] for place in small.pictures]
    return [
        *(f"--{key}={value}" for key, value in settings.items()),
        *(f"--given={image.where}={image.path}" for image in given),
    ]


def small_files(config: RunConfig, pipe: DiffusionPipeline, folder: Path) -> dict[str, object]:
    """LoRAs and a single file of the small model, where the preset names some."""
    files: dict[str, object] = {}
    if config.model.loras:
        sides = [f"{name.partition(':')[0]}:" if ":" in name else "" for name in config.model.loras]
        loras = [
            f"{side}{save_lora(folder / f'{seed}.safetensors', random_lora(pipe.transformer, seed=seed))}"
            for seed, side in enumerate(sides)
        ]
        files["model.loras"] = f"[{', '.join(loras)}]"
    if config.model.single_file is not None:
        tensors = {ltx_transformer(key): x.contiguous() for key, x in pipe.transformer.state_dict().items()}
        tensors |= {ltx_vae(key, "0.9.5"): x.contiguous() for key, x in pipe.vae.state_dict().items()}
        files["model.single_file"] = folder / "ltxv.safetensors"
        safetensors.torch.save_file(tensors, folder / "ltxv.safetensors")
        for part in ("transformer", "vae"):  # which come from the file
            next((folder / "model" / part).glob("*.safetensors")).unlink()
    return files


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_one_rank_and_four(preset: str, tmp_path: Path) -> None:
    """Dual steps and local ones, with the latents of one rank on four, whose arrangement the command chooses."""
    command = [f"--config={ROOT / 'configs' / preset}.yaml", "--prompt=a red circle", "--model.device=cpu"]
    command += [*words_of(preset, tmp_path), "--output.progress=off"]
    made = {}
    for ranks in (1, RANKS):
        target = tmp_path / f"{ranks}/a.mp4"
        target.parent.mkdir()
        files = [f"--output.path={target}", f"--output.save_latents={target.with_suffix('.safetensors')}"]
        ended = run_forked([[*command, *files]] * ranks, target.parent)
        assert [rank.code for rank in ended] == [0] * ranks, ended
        record = json.loads(target.with_suffix(".json").read_text())
        assert record["parallel"]["ranks"] == ranks
        assert {step["mode"] for step in record["steps"]} == {"dual", "local"}
        assert count_frames(target) == record["config"]["video"]["num_frames"]
        made[ranks] = latents_of(target)
    if "ltx" in preset:  # with guidance both passes are a batch on one rank, and not on four: tests/engine/golden.py
        assert relative(made[RANKS], made[1]) < 1e-4
    else:
        assert torch.equal(made[RANKS], made[1])


@pytest.mark.slow
def test_another_seed_is_seen(tmp_path: Path) -> None:
    """Negative control of the test above, and what says that every preset is in it."""
    assert all(preset.startswith(("tiny-", *MODELS)) for preset in PRESETS)
    words = words_of("wan2.1-t2v-1.3b", tmp_path)
    made = []
    for seed, ranks in ((0, 1), (1, RANKS)):
        target = tmp_path / f"{seed}/a.mp4"
        target.parent.mkdir()
        files = [f"--output.path={target}", f"--output.save_latents={target.with_suffix('.safetensors')}"]
        command = ["--config=wan2.1-t2v-1.3b", "--prompt=a red circle", "--model.device=cpu", *words, *files]
        ended = run_forked([[*command, f"--sampler.seed={seed}"]] * ranks, target.parent)
        assert [rank.code for rank in ended] == [0] * ranks, ended
        made.append(latents_of(target))
    assert relative(*made) > 1e-1
