"""LoRAs are added to the weights as the rule says, in every published layout, or refused in one line with numbers."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.load.checkpoint import open_checkpoint
from engine.load.loras import describe_loras
from engine.load.pipeline import load_pipeline
from engine.load.provenance import describe_weights
from engine.planner.arrange import check_settings
from engine.planner.model import read_model
from tests.engine.applied import MODELS, applied, latents_of
from tests.engine.denoise.test_few_steps import WAN, few
from tests.engine.golden import PROMPT, relative
from tests.loras import ALPHA, Layers, random_lora, save_lora

LAYOUTS = [("wan", "diffusers"), ("wan", "authors"), ("wan", "kohya"), ("ltx", "diffusers")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name], safe_serialization=True)
    return made


def model_config(folder: Path, *loras: object, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", loras=tuple(str(lora) for lora in loras), **settings)


def added(weights: dict[str, Tensor], layers: Layers, scale: float, layout: str = "diffusers") -> dict[str, Tensor]:
    """W + scale (alpha / rank) B A, in fp64."""
    changed = {name: tensor.double() for name, tensor in weights.items()}
    for layer, (down, up) in layers.items():
        factor = scale if layout == "diffusers" else scale * ALPHA / len(down)
        changed[f"{layer}.weight"] += factor * up.double() @ down.double()
    return changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_weights_are_changed_by_the_rule(
    folders: dict[str, Path], family: str, layout: str, dtype: str, tmp_path: Path
) -> None:
    folder = folders[family]
    plain = load_pipeline(model_config(folder, dtype=dtype), with_text=False).transformer
    first, second = random_lora(plain, seed=1), random_lora(plain, seed=2, rank=1)
    one = save_lora(tmp_path / "one@v2" / "one.safetensors", first, layout)
    two = save_lora(tmp_path / "two.safetensors", second)
    # A folder whose name has an @, and a file with a scale.
    fused = load_pipeline(model_config(folder, one.parent, f"{two}@-0.5", dtype=dtype), with_text=False).transformer
    wanted = added(added(plain.state_dict(), first, 1.0, layout), second, -0.5)
    assert fused.state_dict().keys() == wanted.keys()
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert all(p.requires_grad for p in fused.parameters())
    for name, tensor in fused.state_dict().items():
        assert tensor.dtype == plain.state_dict()[name].dtype
        if name.removesuffix(".weight") in first:
            error = relative(tensor.double(), wanted[name])
            assert error < {"float32": 1e-6, "bfloat16": 2**-7}[dtype], name
            assert relative(plain.state_dict()[name].double(), wanted[name]) > 0.1
        else:
            assert torch.equal(tensor, plain.state_dict()[name]), name


@pytest.mark.parametrize("family", MODELS)
def test_on_your_own_pipeline_before_and_after_the_method(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Unfused, beside the weights, as diffusers has them: the same video as fused ones up to rounding."""
    pipe = MODELS[family]()
    file = save_lora(tmp_path / "a.safetensors", random_lora(pipe.transformer))
    fused = load_pipeline(model_config(folders[family], f"{file}@0.5"))
    with applied(fused):
        wanted = latents_of(fused)
    with applied(pipe):
        without = latents_of(pipe)
        pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="a")
        pipe.set_adapters(["a"], [0.5])
        after = latents_of(pipe)
    with applied(pipe):
        before = latents_of(pipe)
        pipe.unload_lora_weights()
        assert torch.equal(latents_of(pipe), without)
    assert torch.equal(before, after)
    assert relative(after, wanted) < 1e-4
    assert relative(without, wanted) > 1e-2


def change(layers: Layers, layer: str, **parts: Tensor | None) -> Layers:
    down, up = layers[layer]
    return layers | {layer: (parts.get("down", down), parts.get("up", up))}


QUERY = "blocks.0.attn1.to_q"
Spoil = Callable[[Layers, Path], Any]
WRONG: dict[str, tuple[str, Spoil]] = {
    "another depth": (
        r"is of another model: 20 of its 20 layers do not fit .*; the transformer has no blocks\.5",
        lambda layers, file: save_lora(file, {k.replace("blocks.", "blocks.5"): v for k, v in layers.items()}),
    ),
    "another width": (
        r"1 of its 20 layers do not fit .*; blocks.0.attn1.to_q is \(48, 48\) there, and the LoRA \(48, 2\) x \(2, 96\)",
        lambda layers, file: save_lora(file, change(layers, QUERY, down=torch.ones(2, 96))),
    ),
    "another bias": (
        r"1 of its 20 layers .* has a bias of \(48,\) there, and the LoRA of \(7,\)",
        lambda layers, file: save_lora(file, layers, extra={f"transformer.{QUERY}.lora_B.bias": torch.ones(7)}),
    ),
    "half a layer": (
        r"1 of its 21 layers .*; proj_out has only A weight of A weight and B weight",
        lambda layers, file: save_lora(file, layers, extra={"transformer.proj_out.lora_A.weight": torch.ones(2, 48)}),
    ),
    "a text encoder": (
        "is not a LoRA of Wan text-to-video: of its 41 tensors text_encoder.x.lora_A.weight has no place; names must be",
        lambda layers, file: save_lora(file, layers, extra={"text_encoder.x.lora_A.weight": torch.ones(1, 1)}),
    ),
    "no LoRA": (
        "of its 1 tensors blocks.0.attn1.to_q.weight has no place",
        lambda _, file: save_lora(file, {}, extra={f"{QUERY}.weight": torch.ones(1)}),
    ),
    "no tensors": ("of its 0 tensors nothing has no place", lambda _, file: save_lora(file, {})),
    "other tools": (
        "cannot load the LoRA .*a.safetensors: ",
        lambda _, file: save_lora(file, {}, extra={"lora_unet_down_blocks_0_attn.lora_down.weight": torch.ones(1, 1)}),
    ),
    "DoRA": ("is a DoRA", lambda layers, file: save_lora(file, layers, extra={"x.dora_scale": torch.ones(1)})),
    "quantised": (
        "holds tensors of F8_E4M3",
        lambda layers, file: save_lora(file, layers, extra={"x": torch.ones(1).to(torch.float8_e4m3fn)}),
    ),
    "not finite": (
        "cannot load the LoRA .*a.safetensors: ValueError: NaNs",
        lambda layers, file: save_lora(file, change(layers, QUERY, up=torch.full((48, 2), torch.inf))),
    ),
    "cut short": (
        "is broken or cut short",
        lambda layers, file: file.write_bytes(save_lora(file, layers).read_bytes()[:-9]),
    ),
    "no file": ("neither a file or folder here nor ORGANISATION/NAME", lambda *_: None),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], case: str, tmp_path: Path) -> None:
    told, spoil = WRONG[case]
    spoil(random_lora(MODELS["wan"]().transformer), tmp_path / "a.safetensors")
    model = model_config(folders["wan"], tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told) as caught:
        load_pipeline(model, with_text=False)
    assert "\n" not in str(caught.value)
    if case not in ("not finite",):  # by the command that plans, too, before weights are read
        with pytest.raises(UserError, match=told):
            check_settings(dataclasses.replace(few(WAN, folders["wan"]), model=model), read_model(model))


def test_names_are_checked_before_anything_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    for names, told in {
        ("a.ckpt",): "is a pickle",
        ("a@0",): "the scale of the LoRA a@0 must be",
        ("a@nan",): "must be a finite number",
        ("@2",): "",
        ("a@1", "a@2"): "names a LoRA twice",
    }.items():
        if told:
            with pytest.raises(UserError, match=told):
                model_config(folders["wan"], *names)
    for name in ("someone/loras", "someone/loras/a.safetensors", "here.safetensors", tmp_path):
        model = model_config(folders["wan"], f"{name}@abc")
        line = f"the scale of the LoRA {name}@abc must be a number, got 'abc'; give {name}@1, or leave it out"
        with pytest.raises(UserError, match=re.escape(line)):
            check_settings(dataclasses.replace(few(WAN, folders["wan"]), model=model), read_model(model))
    with pytest.raises(UserError, match="neither a file or folder here"):  # no scale
        load_pipeline(model_config(folders["wan"], f"{tmp_path}/gone@v2/a.safetensors"), with_text=False)
    for name, told in {
        "lightx2v/Wan2.2-Distill-Loras/wan2.2_t2v_A14b_low_noise_lora.safetensors": "one of the two transformers of Wan2.2",
        str(tmp_path): "must hold one .safetensors file, and has no .safetensors file",
    }.items():
        with pytest.raises(UserError, match=told):
            load_pipeline(model_config(folders["wan"], name), with_text=False)


def test_tensors_that_diffusers_drops_are_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = MODELS["wan"]()
    extra = {
        "diffusion_model.blocks.0.norm3.diff": torch.tensor([0.0, -0.25]),
        "diffusion_model.blocks.1.norm3.diff_b": torch.zeros(2),
        "diffusion_model.blocks.0.diff_m": torch.full((1, 6, 48), 0.125),
        "diffusion_model.blocks.0.self_attn.q.diff_b": torch.full((48,), 0.5),  # which it takes
    }
    file = save_lora(tmp_path / "a.safetensors", random_lora(pipe.transformer), "authors", extra)
    model = model_config(folders["wan"], f"{file}@2")
    checkpoint = open_checkpoint(model)
    [note] = describe_loras(model, checkpoint.adapter, checkpoint.read("transformer/config.json"), "there")
    assert note == (
        "of the LoRA a.safetensors diffusers leaves out 2 of 64 tensors, which are not zero (up to 0.25, "
        "diffusion_model.blocks.0.norm3.diff)"
    )
    [described] = describe_weights(model)["loras"]
    assert (described["name"], described["scale"], described["dropped_tensors"]) == ("a.safetensors", 2.0, 2)
    bias = load_pipeline(model, with_text=False).transformer.get_parameter("blocks.0.attn1.to_q.bias")
    torch.testing.assert_close(bias - pipe.transformer.get_parameter("blocks.0.attn1.to_q.bias"), torch.ones(48))


def test_ids_have_content_and_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = random_lora(MODELS["wan"]().transformer)
    one, two = (
        save_lora(tmp_path / "1/a.safetensors", layers),
        save_lora(tmp_path / "2/a.safetensors", random_lora(MODELS["wan"]().transformer, seed=3)),
    )
    folder = folders["wan"]
    models = [model_config(folder), *(model_config(folder, lora) for lora in (one, f"{one}@0.5", two))]
    found = [open_checkpoint(model).digest for model in models]
    assert len(set(found)) == 4
    assert found[1] == open_checkpoint(model_config(folder, f"{one}@1.0")).digest
    settings = open_checkpoint(models[2]).settings(dataclasses.replace(few(WAN, folder), model=models[2]), prompt="x")
    assert settings["loras"] == ["a.safetensors@0.5"]
    assert "loras" not in open_checkpoint(models[0]).settings(few(WAN, folder), prompt="x")


def test_a_lora_of_the_hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--someone--loras", "0123456789abcdef0123456789abcdef01234567"
    file = save_lora(home / "snapshots" / commit / "sub/fast.safetensors", random_lora(MODELS["wan"]().transformer))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    shutil.copy(file, home / "snapshots" / commit / "pytorch_lora_weights.safetensors")
    for name in ("someone/loras/sub/fast.safetensors", "someone/loras@0.5"):
        model = model_config(folders["wan"], name, offline=True)
        [described] = describe_weights(model)["loras"]
        assert described["commit"] == commit
    with pytest.raises(
        UserError, match=r"the LoRA 'someone/gone' is not a file here, and the hub .*model.offline is true"
    ):
        load_pipeline(model_config(folders["wan"], "someone/gone", offline=True), with_text=False)


def test_an_engine_makes_another_video_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    config = few(WAN, folders["wan"], timesteps=(1000.0, 400.0))
    file = save_lora(tmp_path / "a.safetensors", random_lora(MODELS["wan"]().transformer))
    made = []
    for loras in ((), (str(file),)):
        with contextlib.closing(
            LongVideoEngine(dataclasses.replace(config, model=model_config(folders["wan"], *loras)))
        ) as engine:
            made.append(engine.denoise(PROMPT).latents)
            assert ("loras" in engine.facts.model) == bool(loras)
    assert relative(*made) > 1e-2
