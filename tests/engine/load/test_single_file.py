"""A file in its authors' layout makes the model that the folder with the same weights makes, to the bit and in every dtype."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline

from engine.adapters import ModelAdapter, adapter_named
from engine.adapters.published import PUBLISHED
from engine.config import ModelConfig
from engine.errors import UserError
from engine.load.pipeline import load_pipeline, load_vae_alone
from engine.load.single_file import SingleFile, open_single_files
from tests.original_layout import ltx_transformer, ltx_vae, wan_transformer
from tests.tiny_pipelines import random_i2v, random_ti2v, random_wan, save_random_ltx

LTX_VERSIONS = {
    "Lightricks/LTX-Video": "0.9.0",
    "diffusers/LTX-Video-0.9.1": "0.9.1",
    "Lightricks/LTX-Video-0.9.5": "0.9.5",  # and 0.9.6 dev
    "Lightricks/LTX-Video-0.9.7-dev": "0.9.5",
    "Lightricks/LTX-Video-0.9.7-distilled": "0.9.5",
    "Lightricks/LTX-Video-0.9.8-13B-distilled": "0.9.5",
}
# Beside the weights: statistics that diffusers does not use.
IGNORED = {"vae.per_channel_statistics.channel": (128,), "vae.per_channel_statistics.mean-of-stds": (128,)}


def tensors_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(next((folder / part).glob("*.safetensors")))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder, the same without the transformer's weights, and those in a file as they are published for other programs."""
    return of_wan(random_wan(), tmp_path_factory.mktemp("wan") / "whole")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return of_wan(random_i2v("i2v"), tmp_path_factory.mktemp("i2v") / "whole")


@pytest.fixture(scope="module")
def flf2v(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return of_wan(random_i2v("flf2v"), tmp_path_factory.mktemp("flf2v") / "whole")


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return of_wan(random_ti2v(), tmp_path_factory.mktemp("ti2v") / "whole")


def of_wan(pipe: DiffusionPipeline, whole: Path) -> SimpleNamespace:
    pipe.save_pretrained(whole)
    tensors = {wan_transformer(k, "model.diffusion_model."): t for k, t in tensors_of(whole, "transformer").items()}
    return lay_out(whole, tensors, ("transformer",))


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    whole = save_random_ltx(tmp_path_factory.mktemp("ltx") / "whole")
    tensors = {ltx_transformer(key): tensor for key, tensor in tensors_of(whole, "transformer").items()}
    tensors |= {ltx_vae(key, "0.9.0"): tensor for key, tensor in tensors_of(whole, "vae").items()}
    tensors |= {name: torch.zeros(4) for name in IGNORED}
    return lay_out(whole, tensors, ("transformer", "vae"))


def lay_out(whole: Path, tensors: dict[str, torch.Tensor], parts: tuple[str, ...]) -> SimpleNamespace:
    bare = whole.parent / "bare"
    shutil.copytree(whole, bare)
    for part in parts:
        next((bare / part).glob("*.safetensors")).unlink()
    file = whole.parent / "model.safetensors"
    safetensors.torch.save_file(tensors, file)
    return SimpleNamespace(whole=whole, bare=bare, file=file, tensors=tensors)


def config_of(folder: Path, file: Path | str | None = None, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), single_file=None if file is None else str(file), device="cpu", **settings)


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert tensor.dtype == states[1][key].dtype, key
        assert torch.equal(tensor, states[1][key]), key


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *itertools.product(("wan", "ltx"), ("float32", "bfloat16", "float16")),
        ("i2v", "bfloat16"),
        ("flf2v", "bfloat16"),
        ("ti2v", "bfloat16"),
    ],
)
def test_every_tensor_is_that_of_the_folder(family: str, dtype: str, request: pytest.FixtureRequest) -> None:
    given = request.getfixturevalue(family)
    whole = load_pipeline(config_of(given.whole, dtype=dtype))
    single = load_pipeline(config_of(given.bare, given.file, dtype=dtype))
    for part in ("transformer", "vae", "text_encoder"):
        assert_same(getattr(single, part), getattr(whole, part))
    assert not any(p.is_meta for p in (*single.transformer.parameters(), *single.transformer.buffers()))
    if family == "wan" and dtype == "bfloat16":  # what diffusers' own loading of a single file would round
        assert single.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32


def test_the_positions_of_two_pictures_are_of_the_file(flf2v: SimpleNamespace, tmp_path: Path) -> None:
    """diffusers does not convert their name, and would leave them out."""
    name = "model.diffusion_model.img_emb.emb_pos"
    assert flf2v.tensors[name].abs().max() > 0.1
    fewer = {key: tensor for key, tensor in flf2v.tensors.items() if key != name}
    safetensors.torch.save_file(fewer, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks condition_embedder\.image_embedder\.pos_embed, by .*") as caught:
        load_pipeline(config_of(flf2v.bare, tmp_path / "model.safetensors"))
    assert "\n" not in str(caught.value)


def test_the_vae_alone_comes_from_the_file_too(ltx: SimpleNamespace) -> None:
    assert_same(load_vae_alone(config_of(ltx.bare, ltx.file))[1], load_vae_alone(config_of(ltx.whole))[1])


def without(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(key)


def change(key: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({key: value})


PREFIX = "model.diffusion_model."
BROKEN = {
    "no tensor": (without(f"{PREFIX}blocks.1.self_attn.q.weight"), r"model\.safetensors lacks blocks\.1\.attn1\.to_q"),
    "a wrong shape": (change(f"{PREFIX}head.head.bias", torch.zeros(3)), r"has another shape for proj_out\.bias"),
    "a surplus": (change(f"{PREFIX}img_emb.proj.0.bias", torch.zeros(3)), "has the unknown condition_embedder.image"),
    "quantised": (
        change(f"{PREFIX}head.head.bias", torch.zeros(16).to(torch.float8_e4m3fn)),
        "holds tensors of F8_E4M3",
    ),
    "of another model": (
        lambda tensors: tensors.clear() or tensors.update(x=torch.ones(1)),
        "holds nothing of Wan text",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(wan: SimpleNamespace, tmp_path: Path, name: str) -> None:
    damage, message = BROKEN[name]
    tensors = dict(wan.tensors)
    damage(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_pipeline(config_of(wan.bare, tmp_path / "model.safetensors"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_or_a_pointer_is_one_line(wan: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(wan.file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is broken or cut short"):
        load_pipeline(config_of(wan.bare, file))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"is a pointer of git-lfs and not the file itself; run git lfs pull"):
        load_pipeline(config_of(wan.bare, file))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.pth", r"model\.single_file weights\.pth is a pickle, which can run code and is not read"),
        ("A/B/weights.ckpt", "is a pickle"),
        (
            "Comfy-Org/Wan_2.2/wan2.2_t2v_high_noise_14B_fp16.safetensors",
            "the file .*high_noise_14B_fp16.safetensors is of one of the two transformers .* give it as high:Comfy-Org/Wan_2.2/wan2.2_t2v_high",
        ),
        (
            "A/Wan2.2-T2V-A14B/low_noise_model/model.safetensors",
            "low_noise_model/model.safetensors is of one of the two transformers",
        ),
        ("A/B/Wan2_2-T2V-A14B-LOW_bf16.safetensors", "is of one of the two transformers"),
        ("wan22_t2v_14B_HIGH.safetensors", "is of one of the two transformers"),
        ("A/B/wan2.2_ti2v_5B_high.safetensors", r"model\.offline is true"),
        ("A/B/wan2.1_t2v_14B_highres.safetensors", r"model\.offline is true"),
        ("weights.sft", r"must be a \.safetensors or a \.gguf file, got 'weights\.sft'"),
        ("~nosuchuser/w.safetensors", r"cannot resolve '~nosuchuser/w\.safetensors'"),
        ("nowhere.safetensors", r"is neither a file here nor ORGANISATION/NAME/FILE of the hub"),
        ("A/B/nowhere.safetensors", r"model\.offline is true, and it is not in the hub's local copy"),
    ],
)
def test_names_that_are_refused(wan: SimpleNamespace, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_pipeline(config_of(wan.bare, name, offline=True))
    assert "\n" not in str(caught.value)


def test_a_link_to_one_of_two_transformers_is_refused(wan: SimpleNamespace, tmp_path: Path) -> None:
    named = tmp_path / "wan2.2_t2v_low_noise_14B_fp16.safetensors"
    shutil.copy(wan.file, named)
    (tmp_path / "mine.safetensors").symlink_to(named)
    with pytest.raises(UserError, match=r"low_noise_14B_fp16\.safetensors is of one of the two transformers"):
        load_pipeline(config_of(wan.bare, tmp_path / "mine.safetensors"))


def test_file_as_model_path_names_the_right_setting(wan: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is one file; give it as model\.single_file"):
        load_pipeline(config_of(wan.file))
    (tmp_path / "all.ckpt").touch()
    with pytest.raises(UserError, match=r"all\.ckpt is a pickle, which can run code and is not read"):
        load_pipeline(config_of(tmp_path / "all.ckpt"))


def test_a_folder_without_weights_is_not_enough_alone(wan: SimpleNamespace) -> None:
    """Negative control: it is the file that the transformer of the tests above was read from."""
    with pytest.raises(UserError, match="transformer has no weights"):
        load_pipeline(config_of(wan.bare))


def originals(name: str) -> tuple[ModelAdapter, dict[str, tuple[int, ...]]]:
    """The tensors of a published checkpoint's single file by their authors' names, from the meta device."""
    adapter = adapter_named(PUBLISHED[name]["model_index"], name)
    with torch.device("meta"):
        parts = {part: adapter.build(part, PUBLISHED[name][part]) for part in ("transformer", "vae")}
    shapes = {part: {key: tuple(t.shape) for key, t in model.state_dict().items()} for part, model in parts.items()}
    if name not in LTX_VERSIONS:
        return adapter, {wan_transformer(key): shape for key, shape in shapes["transformer"].items()}
    named = {ltx_transformer(key): shape for key, shape in shapes["transformer"].items()}
    return adapter, named | {ltx_vae(key, LTX_VERSIONS[name]): shape for key, shape in shapes["vae"].items()} | IGNORED


# Tensors that tell the published files apart, by which diffusers knows a version (loaders/single_file_utils.py).
KNOWN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "head.modulation",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "head.modulation",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "blocks.0.cross_attn.k_img.weight",
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "img_emb.proj.0.bias",
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": "img_emb.emb_pos",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "head.modulation",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "head.modulation",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "head.modulation",
    "Lightricks/LTX-Video": "vae.decoder.up_blocks.9.res_blocks.0.conv1.conv.weight",
    "diffusers/LTX-Video-0.9.1": "vae.decoder.last_time_embedder.timestep_embedder.linear_1.weight",
    "Lightricks/LTX-Video-0.9.5": "vae.decoder.last_scale_shift_table",
    "Lightricks/LTX-Video-0.9.7-dev": "model.diffusion_model.transformer_blocks.47.scale_shift_table",
    "Lightricks/LTX-Video-0.9.7-distilled": "vae.decoder.last_scale_shift_table",
    "Lightricks/LTX-Video-0.9.8-13B-distilled": "vae.decoder.last_scale_shift_table",
}


def test_every_published_checkpoint_is_known() -> None:
    assert set(KNOWN) == set(PUBLISHED)


@pytest.mark.parametrize("name", KNOWN)
def test_files_of_the_real_sizes_fit_the_published_configurations(name: str, tmp_path: Path) -> None:
    adapter, shapes = originals(name)
    assert KNOWN[name] in shapes
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(PUBLISHED[name][part]))
    parts = ("transformer", "vae") if name in LTX_VERSIONS else ("transformer",)
    found = {part for part, mark in adapter.single_file_marks.items() if any(key.endswith(mark) for key in shapes)}
    assert found == set(parts)
    for part in parts:
        SingleFile(path=Path("a.safetensors"), parts=parts, shapes=shapes).check(adapter, tmp_path, part)
    fewer = {key: shape for key, shape in shapes.items() if not key.endswith("transformer_blocks.3.scale_shift_table")}
    fewer = {key: shape for key, shape in fewer.items() if not key.endswith("blocks.3.modulation")}
    assert len(fewer) == len(shapes) - 1
    with pytest.raises(UserError, match=r"a\.safetensors lacks .*blocks\.3\.scale_shift_table"):
        SingleFile(path=Path("a.safetensors"), parts=parts, shapes=fewer).check(adapter, tmp_path, "transformer")


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    """The transformer of all versions is the same; the VAE is what does not fit."""
    adapter, shapes = originals("diffusers/LTX-Video-0.9.1")
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        config = PUBLISHED["Lightricks/LTX-Video-0.9.5"][part]
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"a\.safetensors (lacks|has another shape for)"):
        SingleFile(path=Path("a.safetensors"), parts=("transformer", "vae"), shapes=shapes).check(
            adapter, tmp_path, "vae"
        )


def test_without_a_setting_there_is_no_file(wan: SimpleNamespace) -> None:
    assert open_single_files(config_of(wan.whole), adapter_named({"_class_name": "WanPipeline"}, "")) == {}
