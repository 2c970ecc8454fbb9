"""Two files (`model.single_file "[high:FILE, low:FILE]"`) are the two transformers of a folder, each in its own steps."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import safetensors.torch
import torch
from torch import nn

from benchmarks.predicted import GGUF_BLOCKS, gguf_bytes
from engine.adapters.base import says_expert
from engine.checks import check_experts
from engine.config import ModelConfig, RunConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load import loras, single_file
from engine.load.checkpoint import open_checkpoint
from engine.load.experts import SIDES
from engine.load.loras import find_loras
from engine.load.pipeline import load_pipeline
from engine.load.single_file import find_single_files
from engine.planner.gpu import read_gpu
from engine.planner.model import read_model
from engine.planner.plan import Case as PlannedCase
from launch.cli.start import run_here
from tests.engine import test_two_experts
from tests.engine.golden import first_picture, relative
from tests.engine.load.test_block_offload import on_a_cpu
from tests.engine.load.test_quantised import round_to_fp8, unpack, video
from tests.engine.load.test_single_file import assert_same
from tests.engine.test_pictures import config_of as config_of_pictures
from tests.gguf_files import save_gguf
from tests.loras import random_lora, save_lora
from tests.original_layout import wan_transformer
from tests.tiny_pipelines import random_i2v, random_wan22

EXPERTS = ("transformer", "transformer_2")
Q = gguf.GGMLQuantizationType


def lay_out(pipe: Any, folder: Path) -> SimpleNamespace:
    """A folder, the same without the transformers' weights, and those in files as they are published for other programs."""
    whole, bare = folder / "whole", folder / "bare"
    pipe.save_pretrained(whole)
    shutil.copytree(whole, bare)
    files: dict[str, dict[str, Path]] = {"safetensors": {}, "gguf": {}}
    for side, part, kind in zip(SIDES, EXPERTS, (Q.Q8_0, Q.Q4_0), strict=True):
        next((bare / part).glob("*.safetensors")).unlink()
        state = getattr(pipe, part).state_dict()
        files["safetensors"][side] = folder / f"{side[0]}.safetensors"  # a name that does not say which one it is
        tensors = {wan_transformer(key, "model.diffusion_model."): tensor for key, tensor in state.items()}
        safetensors.torch.save_file(tensors, files["safetensors"][side])
        named = folder / f"{side.title()}Noise/Wan2.2-T2V-A14B-{side.title()}Noise-{kind.name}.gguf"
        named.parent.mkdir()
        files["gguf"][side] = save_gguf(named, state, wan_transformer, kind)
    return SimpleNamespace(whole=whole, bare=bare, **files)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Rows are multiples of 32, as GGUF wants them."""
    return lay_out(random_wan22(head_dim=16), tmp_path_factory.mktemp("pair"))


def named(files: dict[str, Path], *sides: str) -> tuple[str, ...]:
    return tuple(f"{side}:{files[side]}" for side in sides or SIDES)


def config_of(folder: Path, single_file: tuple[str, ...] | str | None = None, **model: Any) -> RunConfig:
    return test_two_experts.config_of(folder, single_file=single_file, **model)


def aligned(transformer: nn.Module) -> None:
    """Copy weights to where torch would put them: some CPUs sum in another order by a weight's offset in its file."""
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()


def test_two_files_are_the_video_of_the_folder(pair: SimpleNamespace) -> None:
    made = video(config_of(pair.bare, named(pair.safetensors)), aligned)
    assert torch.equal(made, video(config_of(pair.whole), aligned))
    swapped = (f"high:{pair.safetensors['low']}", f"low:{pair.safetensors['high']}")
    assert relative(video(config_of(pair.bare, swapped), aligned), made) > 1e-2  # only names of files could show it


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_every_tensor_is_that_of_the_folder(pair: SimpleNamespace, kind: str, tmp_path: Path) -> None:
    given = pair if kind == "t2v" else lay_out(random_i2v("a14b", head_dim=16), tmp_path)
    whole = load_pipeline(config_of(given.whole, dtype="bfloat16").model)
    files = load_pipeline(config_of(given.bare, named(given.safetensors), dtype="bfloat16").model)
    for part in EXPERTS:
        assert_same(getattr(files, part), getattr(whole, part))
    assert not torch.equal(files.transformer.proj_out.weight, files.transformer_2.proj_out.weight)
    if kind == "i2v":
        config, first = config_of_pictures(given.whole, frames=17), first_picture(tmp_path / "first.png", 32, 48)
        model = dataclasses.replace(config.model, path=str(given.bare), single_file=named(given.safetensors))
        made = video(dataclasses.replace(config, model=model), aligned, first)
        assert torch.equal(made, video(config, aligned, first))


@pytest.mark.parametrize("side", SIDES)
def test_one_file_leaves_the_other_transformer_to_the_folder(pair: SimpleNamespace, side: str, tmp_path: Path) -> None:
    part, other = SIDES[side], next(expert for expert in EXPERTS if expert != SIDES[side])
    half = shutil.copytree(pair.bare, tmp_path / "half")
    shutil.copytree(pair.whole / other, half / other, dirs_exist_ok=True)
    (one,) = named(pair.safetensors, side)
    assert torch.equal(video(config_of(half, one), aligned), video(config_of(pair.whole), aligned))
    without = rf"{half / part} has no weights; fetch the .safetensors files of this checkpoint"
    with pytest.raises(UserError, match=rf"{without}$"):
        load_pipeline(config_of(half).model)
    (wrong,) = named(pair.safetensors, next(name for name in SIDES if name != side))
    with pytest.raises(UserError, match=rf"{without}, or add {side}:FILE to model.single_file$"):
        load_pipeline(config_of(half, wrong).model)
    quantised = load_pipeline(config_of(half, *named(pair.gguf, side)).model)
    assert hasattr(getattr(quantised, part).blocks[0].attn1.to_q.weight, "quant_type")
    assert not hasattr(getattr(quantised, other).blocks[0].attn1.to_q.weight, "quant_type")


def test_two_gguf_files_make_one_video_wherever_they_are_kept(pair: SimpleNamespace) -> None:
    """Files of two types of GGUF, and one beside a safetensors file; test_quantised compares with a folder of the same values."""
    made = video(config_of(pair.bare, named(pair.gguf)))
    mixed = named(pair.gguf, "high") + named(pair.safetensors, "low")
    other = video(config_of(pair.bare, mixed))
    assert torch.equal(other, video(config_of(pair.bare, mixed), unpack))
    assert relative(other, made) > 1e-3
    with on_a_cpu():
        assert torch.equal(video(config_of(pair.bare, named(pair.gguf), weights="block_offload")), made)
    assert torch.equal(video(config_of(pair.bare, named(pair.gguf), idle_expert="leave")), made)


def test_loras_and_fp8_come_after_two_files(pair: SimpleNamespace, tmp_path: Path) -> None:
    """Each LoRA into its own transformer, and both in fp8 then."""
    transformer = random_wan22(head_dim=16).transformer
    given = tuple(
        f"{side}:{save_lora(tmp_path / f'{side}.safetensors', random_lora(transformer, seed=seed))}"
        for seed, side in enumerate(SIDES)
    )
    made = video(config_of(pair.bare, named(pair.safetensors), loras=given, storage="fp8"))
    assert torch.equal(made, video(config_of(pair.bare, named(pair.safetensors), loras=given), round_to_fp8))
    fused = [
        load_pipeline(config_of(folder, files, loras=given).model)
        for folder, files in ((pair.bare, named(pair.safetensors)), (pair.whole, None))
    ]
    for part in EXPERTS:
        assert_same(*(getattr(pipe, part) for pipe in fused))
    assert relative(made, video(config_of(pair.bare, named(pair.safetensors), storage="fp8"))) > 1e-3


def test_a_run_that_was_stopped_continues_with_the_same_files(pair: SimpleNamespace, tmp_path: Path) -> None:
    config, state = config_of(pair.bare, named(pair.gguf)), tmp_path / "state"

    def stop(finished: int, _total: int) -> None:
        if finished == 2:
            raise InterruptedError

    with LongVideoEngine(config) as engine, pytest.raises(InterruptedError):
        engine.denoise(test_two_experts.PROMPT, snapshot=state, on_step=stop)
    other = config_of(pair.bare, named(pair.safetensors, "high") + named(pair.gguf, "low"))
    with LongVideoEngine(other) as engine, pytest.raises(UserError, match=r"belongs to another run \(checkpoint was "):
        engine.denoise(test_two_experts.PROMPT, snapshot=state)
    with LongVideoEngine(config) as engine:
        made = engine.denoise(test_two_experts.PROMPT, snapshot=state)
    assert made.resumed_at == 2
    assert torch.equal(made.latents, video(config))


def test_the_public_command_records_both(pair: SimpleNamespace, tmp_path: Path) -> None:
    words = f"--config configs/wan2.2-t2v-a14b.yaml --model.path {pair.bare} --model.device cpu --video.num_frames 29 --video.height 32"
    words += " --video.width 48 --sampler.num_steps 4 --sampler.max_text_tokens 20 --sampler.negative_prompt bad --method.window_frames 3"
    words += f" --prompt x --output.path {tmp_path / 'a.mp4'} --output.progress off --model.single_file"
    run_here("generate", [*words.split(), f"[{', '.join(named(pair.gguf))}]"])
    record = json.loads((tmp_path / "a.json").read_text())
    model = record["model"]
    assert [model[key]["name"] for key in ("single_file", "single_file_2")] == [f.name for f in pair.gguf.values()]
    assert model["single_file"]["sha256"] != model["single_file_2"]["sha256"]
    assert [set(model["stored"][part]) for part in EXPERTS] == [{"Q8_0", "float32"}, {"Q4_0", "float32"}]
    assert record["config"]["model"]["single_file"] == list(named(pair.gguf))


def test_the_files_and_their_sides_decide_the_id(pair: SimpleNamespace) -> None:
    high, low = pair.safetensors.values()
    given = [(f"high:{high}", f"low:{low}"), (f"high:{low}", f"low:{high}"), (f"high:{high}",), (f"low:{high}",), None]
    digests = [open_checkpoint(config_of(pair.whole, files).model).digest for files in given]
    assert len({*digests}) == len(given)
    turned = open_checkpoint(config_of(pair.whole, (f"low:{low}", f"high:{high}")).model).digest
    assert turned == digests[0]


def test_the_planner_counts_each_file(pair: SimpleNamespace) -> None:
    """Both if the idle one stays, otherwise the larger one; what is resident within the 15 % of one file."""

    def planned(files: tuple[str, ...], **model: Any) -> PlannedCase:
        config = config_of(pair.bare, files, dtype="float32", **model)
        return PlannedCase.of(config, read_model(config.model), gpu=read_gpu("h200"), world_size=1)

    with LongVideoEngine(config_of(pair.bare, named(pair.gguf))) as engine:
        held = engine.facts.model["resident_bytes"]
    high, low = (planned((file,)).options.file_bytes for file in named(pair.gguf))
    assert (high[1], low[0]) == (None, None)
    assert planned(named(pair.gguf)).options.file_bytes == (high[0], low[1])
    assert high[0] == pytest.approx(held["transformer"], rel=0.15)
    assert low[1] == pytest.approx(held["transformer_2"], rel=0.15)
    assert low[1] < high[0] == gguf_bytes(read_model(config_of(pair.bare).model), "Q8_0", 4)
    assert all(gguf.GGML_QUANT_SIZES[Q[kind]] == sizes for kind, sizes in GGUF_BLOCKS.items())
    for place, expected in (("stay", high[0] + low[1]), ("leave", high[0])):
        kept = planned(named(pair.gguf), idle_expert=place).kept_weights(1)["transformer"]
        assert kept == pytest.approx(expected, abs=2000)  # each of its tensors' bytes is rounded down
    full = planned(named(pair.safetensors)).spec.weight_bytes(4)["transformer"]
    assert planned(named(pair.safetensors), idle_expert="stay").kept_weights(1)["transformer"] == 2 * full
    mixed = planned(named(pair.gguf, "low"), idle_expert="stay").kept_weights(1)["transformer"]
    assert mixed == pytest.approx(full + low[1], abs=2000)
    assert planned(named(pair.gguf, "low"), idle_expert="leave").kept_weights(1)["transformer"] == full


def lacks_a_tensor(file: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    tensors.pop("model.diffusion_model.blocks.1.self_attn.q.weight")
    safetensors.torch.save_file(tensors, file)


def of_another_width(file: Path) -> None:
    state = random_wan22().transformer.state_dict()
    safetensors.torch.save_file({wan_transformer(key): tensor for key, tensor in state.items()}, file)


BROKEN = {
    lacks_a_tensor: r"{file} lacks blocks\.1\.attn1\.to_q\.weight, by {folder}/config\.json",
    of_another_width: r"{file} has another shape for .*, by {folder}/config\.json; give a file of this model, or fetch it again",
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_named_with_its_transformer(
    pair: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], None], side: str
) -> None:
    files = {other: shutil.copy(pair.safetensors[other], tmp_path) for other in SIDES}
    damage(Path(files[side]))
    where = {"file": files[side], "folder": pair.bare / SIDES[side]}
    with pytest.raises(UserError, match=BROKEN[damage].format(**where)) as refused:
        load_pipeline(config_of(pair.bare, named(files)).model)
    assert "\n" not in str(refused.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"single_file": ()}, "model.single_file names no file"),
    "no name": ({"single_file": "high:"}, "must be a .safetensors or a .gguf file, got ''"),
    "no sides": (
        {"single_file": ("a.gguf", "b.gguf")},
        r"takes one file, or \[high:FILE, low:FILE\] .* got \[a.gguf, b",
    ),
    "one side": ({"single_file": ("high:a.gguf", "high:b.gguf")}, r"takes one file, or \[high:FILE, low:FILE\]"),
    "three": ({"single_file": ("high:a.gguf", "low:b.gguf", "low:c.gguf")}, "takes one file, or"),
    "one file": ({"single_file": ("high:a.gguf", "low:a.gguf")}, "has one file for both transformers"),
    "a pickle": ({"single_file": ("high:a.gguf", "low:b.ckpt")}, "model.single_file b.ckpt is a pickle"),
    "spaces": (
        {"single_file": "[high: a.gguf, low: b.gguf]"},
        r"got \[high: a.gguf, low: b.gguf\]; write .* with no space",
    ),
    "a map": (
        {"single_file": "{high: a.gguf, low: b.gguf}"},
        r"got {high: a.gguf, low: b.gguf}; write .* both in brackets",
    ),
    "no brackets": ({"single_file": "high:a.gguf,low:b.gguf"}, "got high:a.gguf,low:b.gguf; write .* both in brackets"),
    "capitals": ({"single_file": "HIGH:a.gguf"}, "got HIGH:a.gguf; write high: and low: in lower case"),
    "two sides of one": (
        {"single_file": ("high:low:a.gguf",)},
        r"got \[high:low:a.gguf\]; write .* once for each file",
    ),
    "as given": ({"single_file": ("high:a.gguf", "b.gguf")}, r"got \[high:a.gguf, b.gguf\]"),
    "LoRAs": (
        {"single_file": ("high:a.gguf", "low:b.gguf"), "loras": ("high:c",)},
        "and those of a.gguf and b.gguf are quantised",
    ),
    "storage": ({"single_file": ("high:a.safetensors", "low:b.gguf"), "storage": "fp8"}, "would quantise b.gguf again"),
    "zero3": ({"single_file": ("high:a.gguf", "low:b.gguf"), "weights": "zero3"}, "zero3 shards plain tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refused:
        ModelConfig(path="somewhere", **settings)
    assert "\n" not in str(refused.value)


def test_files_that_are_refused(pair: SimpleNamespace, tmp_path: Path) -> None:
    link = tmp_path / "other.safetensors"
    link.symlink_to(pair.safetensors["high"])
    hard, copy = tmp_path / "hard.safetensors", tmp_path / "copy.safetensors"
    hard.hardlink_to(pair.safetensors["high"])
    shutil.copy(pair.safetensors["high"], copy)
    same = "are one, or one is a copy of the other; each transformer has its own weights"
    for files, message in (
        *(((f"high:{pair.safetensors['high']}", f"low:{other}"), same) for other in (link, hard, copy)),
        (
            (f"high:{pair.gguf['low']}",),
            "high:.* is a file for the other transformer, as its name says; give it as low:",
        ),
        (str(pair.safetensors["high"]), "has two transformers: say which of them the file .*h.safetensors replaces"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            load_pipeline(config_of(pair.bare, files).model)
        assert "\n" not in str(refused.value)


SAYS = {
    "A/B/wan2.2_t2v_high_noise_14B_fp16.safetensors": "high",
    "A/B/Wan2_2-T2V-A14B-LOW_fp8.safetensors": "low",
    "m/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": "high",
    "DasiwaWAN22I2V14B_lowNoise.gguf": "low",
    # The name of the file before that of its folder, and the phrase before the word.
    "Wan2.2-high-low/wan_low_noise.safetensors": "low",
    "wan22_high_and_low/low_noise.gguf": "low",
    "wan2.2-low-vram/high_noise.gguf": "high",
    "Wan2.2_high_quality_low_noise.gguf": "low",
    "wan-low-res-high-noise.safetensors": "high",
    "low_noise_model/Wan2.2-HighNoise.gguf": "high",
    "wan-low-res-HighNoise.gguf": "high",
    # The word alone.
    "A14B/high.gguf": "high",
    "A14B/low.safetensors": "low",
    "high/diffusion_pytorch_model.safetensors": "high",
    "low_noise_model/diffusion_pytorch_model.safetensors": "low",
    # Neither, or both.
    "Wan2.2-high-low/model.safetensors": None,
    "wan_high_low.gguf": None,
    "low_noise/of/model.safetensors": None,
    "wan2.1_t2v_14B_highres.safetensors": None,
    "slow.gguf": None,
    "h.gguf": None,
}


@pytest.mark.parametrize("name", SAYS)
def test_the_side_that_a_name_says(name: str) -> None:
    assert says_expert(name) == SAYS[name]


def test_files_in_a_folder_with_both_words_and_short_names(pair: SimpleNamespace, tmp_path: Path) -> None:
    """The right pair is read; swapped files are refused."""
    for folder, suffix in (("Wan2.2-high-low", "_noise"), ("A14B", "")):
        (tmp_path / folder).mkdir()
        for side in SIDES:
            shutil.copy(pair.safetensors[side], tmp_path / folder / f"{side}{suffix}.safetensors")
        files = {side: tmp_path / folder / f"{side}{suffix}.safetensors" for side in SIDES}
        load_pipeline(config_of(pair.bare, named(files)).model)
        swapped = named({"high": files["low"], "low": files["high"]})
        with pytest.raises(UserError, match=rf"give it as low:{files['low']}, or rename the file if its name is wrong"):
            load_pipeline(config_of(pair.bare, swapped).model)


def test_names_of_the_hub_are_checked_before_a_download(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the planner, too: both names are, before the first file is fetched."""
    fetched: list[str] = []

    def fetch(_repository: str, file: str, **_: Any) -> Path:
        fetched.append(file)
        return pair.safetensors["high" if "high" in file else "low"]

    for module in (single_file, loras):
        monkeypatch.setattr(module, "fetch_file", fetch)
    right = tuple(f"{side}:A/B/{side}_noise.safetensors" for side in SIDES)
    twice = ("high:A/B/high_noise.safetensors", "low:A/B/other_high_noise.safetensors")
    find_single_files(config_of(pair.bare, right).model)
    assert fetched == ["high_noise.safetensors", "low_noise.safetensors"]
    fetched.clear()
    for config, find in (
        (config_of(pair.bare, twice), find_single_files),
        (config_of(pair.bare, loras=twice), find_loras),
    ):
        for check in (
            lambda model=config.model, find=find: find(model),
            lambda run=config: check_experts(run, EXPERTS),
        ):
            with pytest.raises(
                UserError, match=r"low:A/B/other_high_noise.safetensors is a .* for the other transformer"
            ):
                check()
    assert fetched == []
