"""Weights in fewer bits: the video of a plain model with those weights, on any number of ranks, and another one than in full."""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from diffusers.quantizers.gguf.utils import (
    GGML_QUANT_SIZES,
    SUPPORTED_GGUF_QUANT_TYPES,
    GGUFLinear,
    GGUFParameter,
    dequantize_gguf_tensor,
)
from torch import Tensor, nn

from engine import apply_method
from engine.config import ModelConfig, RunConfig
from engine.decode.live_bytes import LiveBytes
from engine.engine import LongVideoEngine
from engine.errors import UserError
from engine.given.frames import GivenFrames
from engine.identity import describe_differences
from engine.load.checkpoint import open_checkpoint
from engine.load.pipeline import load_pipeline
from engine.load.quantised import require_package
from engine.load.single_file import open_single_files
from engine.planner.model import GGUF_WORK_BYTES, Stored, read_model
from engine.ranks.layouts import Ranks
from tests.engine import test_ltx_ranks as ltx
from tests.engine import test_pictures
from tests.engine import test_ranks as wan
from tests.engine.applied import latents_of as call
from tests.engine.golden import first_picture, latents_of, mesh_of, on_one_rank, relative
from tests.gguf_files import save_gguf
from tests.loras import random_lora, save_lora
from tests.original_layout import ltx_transformer, wan_transformer
from tests.ranks import run_ranks
from tests.tiny_pipelines import random_i2v, random_ltx, random_ti2v, random_wan, random_wan22

Q = gguf.GGMLQuantizationType
FAMILIES = {"wan": wan, "ltx": ltx}
TORCHAO = ("torchao_int8", "torchao_fp8")
has_torchao = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not has_torchao, reason="the optional package torchao is not installed")
STORAGES = ("fp8", *(pytest.param(kind, marks=needs_torchao) for kind in TORCHAO))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose rows are multiples of 32, as GGUF wants them, each with its transformer as a GGUF file, and for Wan a LoRA."""
    made = {}
    for name, pipe, rename in (
        ("wan", random_wan(head_dim=16), wan_transformer),
        ("ltx", random_ltx(head_dim=8), ltx_transformer),
        ("5b", random_ti2v(head_dim=16), wan_transformer),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(made[name], safe_serialization=True)
        save_gguf(made[name] / "model-Q8_0.gguf", pipe.transformer.state_dict(), rename, Q.Q8_0)
        if name == "wan":
            save_lora(made[name] / "lora.safetensors", random_lora(pipe.transformer))
    made["pair"], pair = tmp_path_factory.mktemp("pair"), random_wan22(head_dim=16)
    pair.save_pretrained(made["pair"], safe_serialization=True)
    for side, transformer in (("high", pair.transformer), ("low", pair.transformer_2)):
        save_gguf(made["pair"] / f"{side}-noise-Q8_0.gguf", transformer.state_dict(), wan_transformer, Q.Q8_0)
    return made


def config_of(folder: Path, method: str = "freespec", **model: Any) -> RunConfig:
    config = FAMILIES["ltx" if folder.name.startswith("ltx") else "wan"].config_of(str(folder), method)
    sampler = dataclasses.replace(config.sampler, num_steps=2)  # a dual step and a local one
    return dataclasses.replace(config, sampler=sampler, model=ModelConfig(path=str(folder), device="cpu", **model))


def video(
    config: RunConfig,
    change: Callable[[nn.Module], Any] = lambda _transformer: None,
    given: GivenFrames | None = None,
) -> Tensor:
    """The latents of one process, with `change` made to each transformer before."""
    with LongVideoEngine(config) as engine, torch.no_grad():
        for transformer in engine.adapter.experts(engine.pipe).values():
            change(transformer)
        return engine.denoise("a red circle", given=given).latents


def round_to_fp8(transformer: nn.Module) -> None:
    """What layerwise casting leaves of the weights: of the linear layers in the blocks, and for LTX-Video of those beside."""
    for name, part in transformer.named_modules():
        if isinstance(part, nn.Linear) and not name.startswith(("condition_embedder", "proj_")):
            for parameter in part.parameters():
                parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)


@pytest.mark.parametrize("family", ["wan", "ltx", "pair", "5b"])
def test_fp8_is_the_video_of_rounded_weights(folders: dict[str, Path], family: str) -> None:
    full, stored = (config_of(folders[family], storage=storage) for storage in ("full", "fp8"))
    made = video(stored)
    assert torch.equal(made, video(full, round_to_fp8))
    assert relative(made, video(full)) > 1e-3


def test_fp8_comes_after_the_loras(folders: dict[str, Path]) -> None:
    lora = (str(folders["wan"] / "lora.safetensors"),)
    full, stored = (config_of(folders["wan"], storage=storage, loras=lora) for storage in ("full", "fp8"))
    made = video(stored)
    assert torch.equal(made, video(full, round_to_fp8))
    assert relative(made, video(config_of(folders["wan"], storage="fp8"))) > 1e-3


@needs_torchao
def test_torchao_comes_after_the_loras(folders: dict[str, Path]) -> None:
    config = config_of(folders["wan"], storage="torchao_int8", loras=(str(folders["wan"] / "lora.safetensors"),))
    made = video(config)
    assert relative(made, video(config, make_whole)) < 1e-5
    assert relative(made, video(config_of(folders["wan"], storage="torchao_int8"))) > 1e-2


def make_whole(transformer: nn.Module) -> None:
    """Put plain weights in the place of torchao's."""
    for part in transformer.modules():
        if isinstance(part, nn.Linear) and hasattr(part.weight, "qdata"):
            part.weight = nn.Parameter(part.weight.dequantize(), requires_grad=False)


@needs_torchao
@pytest.mark.parametrize("storage", TORCHAO)
@pytest.mark.parametrize("family", FAMILIES)
def test_torchao_is_what_diffusers_loads_and_the_video_of_its_values(
    folders: dict[str, Path], family: str, storage: str
) -> None:
    from diffusers import LTXVideoTransformer3DModel, TorchAoConfig  # noqa: PLC0415 - needs the package
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig  # noqa: PLC0415

    kind = Int8WeightOnlyConfig() if storage == "torchao_int8" else Float8WeightOnlyConfig()
    loader = {"wan": WanTransformer3DModel, "ltx": LTXVideoTransformer3DModel}[family]
    loaded = loader.from_pretrained(
        folders[family], subfolder="transformer", quantization_config=TorchAoConfig(kind), dtype=torch.float32
    )
    config = config_of(folders[family], storage=storage)
    ours = load_pipeline(config.model).transformer
    quantised = 0
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), loaded.named_parameters(), strict=True):
        assert type(mine) is type(theirs), name
        if hasattr(mine, "qdata"):
            quantised += 1
            assert torch.equal(mine.qdata.float(), theirs.qdata.float()), name
            assert torch.equal(mine.scale, theirs.scale), name
    assert quantised > 10
    made, plain = video(config), video(config, make_whole)
    assert relative(made, plain) < 1e-5
    assert relative(made, video(config_of(folders[family]))) > 1e-3


@needs_torchao
@pytest.mark.parametrize("family", ["pair", "5b"])
def test_torchao_is_the_video_of_its_values(folders: dict[str, Path], family: str) -> None:
    """Of both transformers, and with a timestep of each token."""
    config = config_of(folders[family], storage="torchao_int8")
    made = video(config)
    assert relative(made, video(config, make_whole)) < 1e-5
    assert relative(made, video(config_of(folders[family]))) > 1e-3


@needs_torchao
@pytest.mark.parametrize("kind", ["i2v", "flf2v", "a14b"])
def test_torchao_of_models_of_pictures(kind: str, tmp_path: Path) -> None:
    random_i2v(kind, head_dim=16).save_pretrained(tmp_path / kind)
    places = ("first", "last")[: 1 + (kind == "flf2v")]
    pictures = [first_picture(tmp_path / f"{place}.png", 32, 48, where=place).images[0] for place in places]
    given = GivenFrames(images=tuple(pictures))
    plain = test_pictures.config_of(tmp_path / kind, frames=17)
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, storage="torchao_int8"))
    made = video(config, given=given)
    assert relative(made, video(config, make_whole, given)) < 1e-5
    assert relative(made, video(plain, given=given)) > 1e-3


def unpack(transformer: nn.Module) -> None:
    """Put plain layers in the place of a GGUF file's."""
    for part in list(transformer.modules()):
        for name, layer in list(part.named_children()):
            if hasattr(layer, "compute_dtype"):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = nn.Parameter(dequantize_gguf_tensor(layer.weight).float(), requires_grad=False)
                plain.bias = layer.bias
                setattr(part, name, plain)


def gguf_of(folder: Path, method: str = "freespec", **model: Any) -> RunConfig:
    files = [f"{side}:{folder / side}-noise-Q8_0.gguf" for side in ("high", "low")]
    single = tuple(files) if folder.name.startswith("pair") else str(folder / "model-Q8_0.gguf")
    return config_of(folder, method, single_file=single, **model)


@pytest.mark.parametrize("family", ["wan", "ltx", "pair", "5b"])
def test_a_gguf_file_is_the_video_of_its_values(folders: dict[str, Path], family: str) -> None:
    made = video(gguf_of(folders[family]))
    assert torch.equal(made, video(gguf_of(folders[family]), unpack))
    assert relative(made, video(config_of(folders[family]))) > 1e-3


@pytest.mark.parametrize("kind", ["i2v", "flf2v", "a14b"])
def test_gguf_files_of_models_of_pictures(kind: str, tmp_path: Path) -> None:
    pipe = random_i2v(kind, head_dim=16)
    pipe.save_pretrained(tmp_path / kind)
    files = [
        str(save_gguf(tmp_path / f"{part}-Q8_0.gguf", getattr(pipe, part).state_dict(), wan_transformer, Q.Q8_0))
        for part in ("transformer", "transformer_2")[: 1 + (kind == "a14b")]
    ]
    places = ("first", "last")[: 1 + (kind == "flf2v")]
    pictures = [first_picture(tmp_path / f"{place}.png", 32, 48, where=place).images[0] for place in places]
    given = GivenFrames(images=tuple(pictures))
    plain = test_pictures.config_of(tmp_path / kind, frames=17)
    single = (f"high:{files[0]}", f"low:{files[1]}") if kind == "a14b" else files[0]
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, single_file=single))
    made = video(config, given=given)
    assert torch.equal(made, video(config, unpack, given))
    assert relative(made, video(plain, given=given)) > 1e-3


def test_a_gguf_file_holds_what_its_own_package_reads(folders: dict[str, Path]) -> None:
    """In bf16, where diffusers keeps some layers in fp32 and the file has the convolution in bf16."""
    config = gguf_of(folders["wan"], dtype="bfloat16").model
    loaded, folder = (
        load_pipeline(config).transformer,
        load_pipeline(dataclasses.replace(config, single_file=None)).transformer,
    )
    read = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(config.single_file).tensors
    }
    quantised = 0
    for (name, mine), (_, theirs) in zip(loaded.named_parameters(), folder.named_parameters(), strict=True):
        value, expected = dequantize_gguf_tensor(mine).float(), read[wan_transformer(name)]
        if hasattr(mine, "quant_type"):
            quantised += 1
            torch.testing.assert_close(value, expected, rtol=2**-10, atol=0)
            assert not torch.equal(value, theirs.float())
        else:
            assert mine.dtype == theirs.dtype, name
            assert torch.equal(mine, theirs), name
    assert quantised == 2 * 10


class Case(NamedTuple):
    """A model, one arrangement of two ranks, a method, and how its weights are stored."""

    folder: str
    degrees: tuple[int, int, int]
    method: str
    storage: str

    @property
    def config(self) -> RunConfig:
        folder = Path(self.folder)
        if self.storage == "gguf":
            return gguf_of(folder, self.method)
        return config_of(folder, self.method, storage=self.storage)


def on_ranks(rank: int, case: Case) -> Tensor:
    return latents_of(case.config, Ranks(mesh=mesh_of(case.degrees)))


def test_ranks_make_the_video_of_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every storage, every layout of two ranks, and a method of each kind; test_apply runs them all on one."""
    storages = ("fp8", "gguf", *(TORCHAO if has_torchao else ()))
    cases = [
        Case(str(folders["wan"]), (1, 1, 2), method, "fp8") for method in ("direct", "freespec", "freepca", "lvsa")
    ]
    cases += [
        Case(str(folders["wan"]), degrees, "freespec", kind) for kind in storages for degrees in ((1, 2, 1), (2, 1, 1))
    ]
    cases += [Case(str(folders["ltx"]), (1, 2, 1), "freespec", kind) for kind in storages]
    cases += [Case(str(folders["pair"]), degrees, "freespec", "gguf") for degrees in ((1, 1, 2), (2, 1, 1))]
    if has_torchao:
        cases += [Case(str(folders[name]), (1, 1, 2), "freespec", "torchao_int8") for name in ("pair", "5b")]
    for case, by_rank in zip(cases, run_ranks(2, on_ranks, cases, tmp_path), strict=True):
        expected = on_one_rank(case.config)
        assert all(torch.equal(latents, expected) for latents in by_rank), case
        if case.method == "freespec":
            assert relative(expected, on_one_rank(case._replace(storage="full").config)) > 1e-3, case


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("storage", ["full", "gguf", *STORAGES])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_counts_the_bytes_that_are_resident(
    folders: dict[str, Path], family: str, storage: str, dtype: str
) -> None:
    folder, itemsize = folders[family], 4 if dtype == "float32" else 2
    config = gguf_of(folder, dtype=dtype) if storage == "gguf" else config_of(folder, storage=storage, dtype=dtype)
    with LongVideoEngine(config) as engine:
        told = engine.facts.model
    spec = read_model(config.model)
    file = open_single_files(config.model, spec.adapter).get("transformer")
    stored = Stored(
        itemsize=itemsize,
        storage=config.model.storage,
        file_bytes=None if file is None else file.stored_bytes(itemsize),
    )
    planned = spec.weight_bytes(itemsize, stored=stored)
    for part in ("text_encoder", "vae"):
        assert told["resident_bytes"][part] == planned[part]
    held = told["resident_bytes"]["transformer"]
    if storage == "gguf":  # whose few layers in fp32 are planned as the others
        assert held == pytest.approx(planned["transformer"], rel=0.15)
    else:
        assert held == planned["transformer"]
    if storage != "full":
        assert held < 0.95 * spec.weight_bytes(itemsize)["transformer"]
    assert told["parameters"] == {name: spec.parameters[name] for name in told["parameters"]}


def test_the_planner_counts_the_layer_that_is_made_whole() -> None:
    """What a forward of one large layer adds, of every type that diffusers reads."""
    size, x = 512, torch.ones(1, 512, dtype=torch.bfloat16)
    cast = nn.Linear(size, size, bias=False).to(torch.bfloat16).requires_grad_(False)
    apply_layerwise_casting_hook(cast, torch.float8_e4m3fn, torch.bfloat16, non_blocking=False)
    layers = {"fp8": cast}
    for kind in SUPPORTED_GGUF_QUANT_TYPES:
        block, stored = GGML_QUANT_SIZES[kind]
        layers[kind.name] = GGUFLinear(size, size, compute_dtype=torch.bfloat16)
        layers[kind.name].weight = GGUFParameter(
            torch.zeros(size, size // block * stored, dtype=torch.uint8), quant_type=kind
        )
    for name, layer in layers.items():
        with torch.no_grad(), LiveBytes() as live:
            layer(x)
        added = live.peak / size**2
        if name == "fp8":  # cast back at the end, one byte, after the first was freed at the beginning
            assert added == pytest.approx(2 + 1, rel=0.01)
        else:
            assert 3.9 < added < GGUF_WORK_BYTES, name


@pytest.mark.parametrize("storage", STORAGES)
def test_ids_records_and_states_name_the_storage(folders: dict[str, Path], storage: str) -> None:
    full, other = config_of(folders["wan"]), config_of(folders["wan"], storage=storage)
    settings = [open_checkpoint(config.model).settings(config, prompt="", seed=0) for config in (full, other)]
    assert describe_differences(*settings) == f"model.storage was unset, now '{storage}'"
    with LongVideoEngine(other) as engine:
        stored = engine.facts.model["stored"]["transformer"]
    kind = "int8" if storage == "torchao_int8" else "float8_e4m3fn"
    assert stored[kind] > stored["float32"] > 0
    assert engine.facts.config.model.storage == storage


def test_ids_and_records_name_the_gguf_file(folders: dict[str, Path]) -> None:
    full, other = config_of(folders["wan"]), gguf_of(folders["wan"])
    assert open_checkpoint(full.model).digest != open_checkpoint(other.model).digest
    with LongVideoEngine(other) as engine:
        told = engine.facts.model
    assert told["single_file"]["name"] == "model-Q8_0.gguf"
    assert set(told["stored"]["transformer"]) == {"Q8_0", "float32"}
    assert told["parameters"]["transformer"] == sum(
        math.prod(p.shape) for p in random_wan(head_dim=16).transformer.parameters()
    )


@pytest.mark.parametrize("storage", ["gguf", *STORAGES])
def test_a_quantised_pipeline_of_ones_own(folders: dict[str, Path], storage: str) -> None:
    pipe, folder = random_wan(head_dim=16), folders["wan"]
    config = gguf_of(folder) if storage == "gguf" else config_of(folder, storage=storage)
    pipe.register_modules(transformer=load_pipeline(config.model).transformer)
    stock = call(pipe, num_frames=9)
    with apply_method(pipe, method="freespec", window_frames=3):
        assert torch.equal(call(pipe, num_frames=9), stock)
        long = call(pipe)
    assert relative(long, call(pipe)) > 1e-3
    assert torch.equal(call(pipe, num_frames=9), stock)


REFUSED = {
    "zero3": (
        {"storage": "fp8", "weights": "zero3"},
        "model.weights zero3 shards plain tensors .* model.storage fp8 are stored otherwise",
    ),
    "compile": (
        {"storage": "torchao_int8", "compile": True},
        "model.compile was not tried with model.storage torchao_int8",
    ),
    "gguf and zero3": (
        {"single_file": "a.gguf", "weights": "zero3"},
        "the weights of the GGUF file a.gguf are stored otherwise",
    ),
    "gguf and compile": ({"single_file": "a.gguf", "compile": True}, "model.compile was not tried with the GGUF file"),
    "gguf again": ({"single_file": "a.gguf", "storage": "fp8"}, "model.storage fp8 would quantise a.gguf again"),
    "gguf and LoRAs": (
        {"single_file": "a.gguf", "loras": ("b",)},
        "LoRAs are added to the weights, and those of a.gguf",
    ),
    "another ending": ({"single_file": "a.bin2"}, "must be a .safetensors or a .gguf file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_quantised_weights_exclude_is_one_line(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refused:
        ModelConfig(path="somewhere", **settings)
    assert "\n" not in str(refused.value)


def test_a_package_that_is_missing_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"model.storage x needs the optional package no_such; pip install '.\[no_such\]'"
    ):
        require_package("no_such", "model.storage x")
    if not has_torchao:
        with pytest.raises(UserError, match=r"model\.storage torchao_int8 needs the optional package torchao"):
            load_pipeline(ModelConfig(path="tiny/wan", device="cpu", storage="torchao_int8"))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def of_another_model(file: Path) -> None:
    save_gguf(file, {"blocks.0.weight": torch.ones(32, 32)}, str, Q.Q8_0)


def lacks_a_tensor(file: Path) -> None:
    tensors = random_wan(head_dim=16).transformer.state_dict()
    tensors.pop("blocks.1.attn1.to_q.weight")
    save_gguf(file, tensors, wan_transformer, Q.Q8_0)


def of_an_unknown_type(file: Path) -> None:
    save_gguf(file, {"blocks.0.attn1.weight": torch.ones(2, 256)}, str, Q.TQ1_0)


BROKEN = {
    cut_short: "is broken or cut short",
    of_another_model: "holds nothing of Wan",
    lacks_a_tensor: r"lacks blocks\.1\.attn1\.to_q\.weight",
    of_an_unknown_type: "holds tensors of TQ1_0, and diffusers reads BF16, ",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_gguf_file_is_one_line(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes((folders["wan"] / "model-Q8_0.gguf").read_bytes())
    damage(file)
    with pytest.raises(UserError, match=BROKEN[damage]) as refused:
        LongVideoEngine(config_of(folders["wan"], single_file=str(file)))
    assert "\n" not in str(refused.value)
