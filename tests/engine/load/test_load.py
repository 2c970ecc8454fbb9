"""Checkpoints that are broken, each in another way: one line that names the file, before anything is made with them."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import engine.load.pipeline
from engine.config import ModelConfig
from engine.devices import pick_dtype
from engine.errors import UserError
from engine.load.checkpoint import find_adapter, open_checkpoint
from engine.load.loras import find_loras
from engine.load.pipeline import check_small_files, load_pipeline, load_tokenizer
from engine.load.single_file import find_single_files
from tests.tiny_pipelines import save_random_wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random_wan(tmp_path_factory.mktemp("wan"))


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def change_tensors(part: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(weights(folder, part))
        change(tensors)
        safetensors.torch.save_file(tensors, weights(folder, part), {"format": "pt"})

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def cut_short(folder: Path) -> None:
    file = weights(folder, "text_encoder")
    file.write_bytes(file.read_bytes()[:-100])


def name_as_pickle(folder: Path) -> None:
    weights(folder, "transformer").rename(folder / "transformer" / "model.bin")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": weights(folder, "transformer").name, "b": "shard-2.safetensors"}}
    (folder / "transformer" / "x.safetensors.index.json").write_text(json.dumps(index))


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def change_scheduler(**changes: object) -> Callable[[Path], None]:
    return change_json("scheduler/scheduler_config.json", **changes)


BROKEN = {
    "no model index": (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
    "index of another class": (
        write("model_index.json", '{"_class_name": "FluxPipeline"}'),
        "names a FluxPipeline; only",
    ),
    "index is a list": (write("model_index.json", "[]"), r"model_index\.json holds \[\] instead of settings; fetch"),
    "index names nothing": (
        write("model_index.json", "{}"),
        r"model_index\.json names no pipeline; its _class_name must be",
    ),
    "index names a list": (change_json("model_index.json", _class_name=[]), r"model_index\.json names no pipeline"),
    "index nested": (write("model_index.json", "[" * 3000 + "]" * 3000), r"model_index\.json is nested too deeply"),
    "a configuration nested": (
        write("transformer/config.json", '{"a":' * 500 + "1" + "}" * 500),
        r"transformer/config\.json is nested more than 100 deep",
    ),
    "a number of 5,000 digits": (
        write("vae/config.json", '{"z_dim": ' + "9" * 5000 + "}"),
        r"vae/config\.json holds a number that is too long",
    ),
    "a configuration that is a number": (
        write("vae/config.json", "5"),
        r"vae/config\.json holds 5 instead of settings",
    ),
    "more layers than a model has": (
        change_json("transformer/config.json", num_layers=10**9),
        r"transformer/config\.json has num_layers 1e\+09, and no transformer has more than 1000",
    ),
    "a head of no channels": (
        change_json("transformer/config.json", attention_head_dim=0),
        r"transformer/config\.json describes no transformer of .* \(\w+: .*\); fetch",
    ),
    "a type that is a map": (
        change_json("text_encoder/config.json", model_type={}),
        "TypeError: unhashable type: 'dict'",
    ),
    "shards that are a list": (
        write("transformer/x.safetensors.index.json", "[5]"),
        "holds \\[5\\] instead of settings",
    ),
    "index is no JSON": (write("model_index.json", "{"), "model_index.json is not JSON"),
    "a Wan2.2 index": (change_json("model_index.json", boundary_ratio=0.875), r"boundary_ratio 0\.875"),
    "no weights": (lambda folder: weights(folder, "vae").unlink(), "vae has no weights"),
    "pickled weights": (name_as_pickle, r"only model\.bin, which can run code and is not read"),
    "weights cut short": (cut_short, "is broken or cut short"),
    "a missing shard": (lose_a_shard, r"transformer lacks shard-2\.safetensors of 2 shards"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), r"tokenizer has no tokenizer\.json or spiece"),
    "a broken tokenizer": (
        write("tokenizer/tokenizer.json", "{"),
        r"cannot load the tokenizer from .*\(tokenizer\.json",
    ),
    "an empty tokenizer": (
        write("tokenizer/tokenizer.json", "{}"),
        r"the tokenizer from .*tokenizer\.json.*: KeyError:",
    ),
    "no tokenizer's model": (
        write("tokenizer/tokenizer.json", '{"added_tokens": [], "model": {}}'),
        r"the tokenizer from .*tokenizer\.json.*: Exception: data did not match",
    ),
    "tokenizer's settings are a list": (
        write("tokenizer/tokenizer_config.json", "[]"),
        "the tokenizer from .*: TypeError:",
    ),
    "an order that is a word": (
        change_scheduler(solver_order="x"),
        r"cannot load the scheduler from .* \(scheduler_config\.json\): TypeError: .*; fetch the checkpoint again",
    ),
    "a shift that is a word": (
        change_scheduler(flow_shift="x"),
        r"the scheduler from .*scheduler_config\.json\): UFuncTypeError",
    ),
    "a scheduler of noise": (
        change_json("model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"]),
        "a flow, which the scheduler EulerDiscreteScheduler does not integrate; use .* UniPCMultistepScheduler, or FlowMatchEuler",
    ),
    "a scheduler told of noise": (
        change_scheduler(prediction_type="epsilon"),
        "the UniPCMultistepScheduler has prediction_type epsilon, not flow_prediction; use",
    ),
    "a mean of one channel": (
        change_json("vae/config.json", latents_mean=[0.1]),
        r"vae/config\.json describes no vae of .*latents_mean must have one number for each of the 4 channels of z_dim, got 1",
    ),
    "a deviation of 0": (change_json("vae/config.json", latents_std=[1, 0, 1, 1]), "more than 0, got 0"),
    "a deviation that is a word": (change_json("vae/config.json", latents_std=["a"] * 4), "more than 0, got 'a'"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), "has no scheduler_config"),
    "no text tensor": (
        change_tensors("text_encoder", lambda tensors: tensors.pop("encoder.final_layer_norm.weight")),
        r"text_encoder lacks encoder\.final_layer_norm\.weight, by its config",
    ),
    "no tied tensor": (change_tensors("text_encoder", lambda tensors: tensors.pop("shared.weight")), "lacks shared"),
    "no tensor": (change_tensors("transformer", lambda t: t.pop("proj_out.weight")), r"lacks proj_out\.weight"),
    "a wrong shape": (
        change_tensors("vae", lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(3)})),
        r"vae has another shape for quant_conv\.bias",
    ),
    "a surplus tensor": (
        change_tensors("transformer", lambda tensors: tensors.update({"lora.up.weight": torch.zeros(3)})),
        r"transformer has the unknown lora\.up\.weight",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_one_line(folder, tmp_path, name):
    damage, message = BROKEN[name]
    broken = tmp_path / "wan"
    shutil.copytree(folder, broken)
    damage(broken)
    with pytest.raises(UserError, match=message) as caught:
        load_pipeline(ModelConfig(path=str(broken), device="cpu"))
    assert "\n" not in str(caught.value)


def test_a_whole_checkpoint_loads_with_one_name_of_a_tied_tensor(folder):
    config = ModelConfig(path=str(folder), device="cpu")
    assert load_pipeline(config).text_encoder is not None
    assert load_pipeline(config, with_text=False).text_encoder is None


def test_the_revision_of_a_folder_is_refused(folder):
    config = dataclasses.replace(ModelConfig(path=str(folder), device="cpu"), revision="main")
    with pytest.raises(UserError, match=r"model\.revision 'main' requires a hub name"):
        load_pipeline(config)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "~nosuchuser/wan", "x" * 5000])
def test_no_folder_is_one_line(path):
    with pytest.raises(
        UserError, match=r"is neither a folder here nor a hub name|cannot look for|cannot resolve '~nosuchuser"
    ) as caught:
        load_pipeline(ModelConfig(path=path, device="cpu"))
    assert "\n" not in str(caught.value)


def test_bfloat16_on_cuda_and_float32_on_a_cpu_and_the_autoencoder_always_in_float32(folder):
    assert pick_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) is torch.float32
    pipe = load_pipeline(ModelConfig(path=str(folder), device="cpu", dtype="bfloat16"))
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float32}


def test_an_old_transformers_and_an_embedding_of_its_own_are_refused(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("transformers.__version__", "5.2.0")
        with pytest.raises(UserError, match=r"transformers 5\.2\.0 loads .* wrongly; install transformers >= 5\.3"):
            load_pipeline(ModelConfig(path=str(folder), device="cpu"))

    def untie(encoder: torch.nn.Module) -> torch.nn.Module:
        return torch.nn.Embedding(*encoder.shared.weight.shape)

    monkeypatch.setattr("transformers.UMT5EncoderModel.get_input_embeddings", untie)
    with pytest.raises(UserError, match="embedding is not the checkpoint's shared one"):
        load_pipeline(ModelConfig(path=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("sentencepiece is required\n\nsee its page"), "sentencepiece is required"),
        (ImportError(), "ImportError"),
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
    ],
)
def test_other_errors_do_not_advise_a_new_download(tmp_path: Path, error: Exception, told: str) -> None:
    with pytest.raises(UserError) as refused, engine.load.pipeline.faults_of(tmp_path / "tokenizer"):
        raise error
    assert str(refused.value) == f"cannot load the tokenizer from {tmp_path / 'tokenizer'}: {told}"


LONG = "x" * 300  # names have at most 255 bytes


@pytest.mark.parametrize("file", ["vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"])
def test_a_file_that_cannot_be_read_is_one_line(folder: Path, tmp_path: Path, file: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / file).unlink(missing_ok=True)
    (copy / file).symlink_to("/proc/self/mem")  # a file whose bytes cannot be read, by root neither
    config = ModelConfig(path=str(copy), device="cpu")
    with pytest.raises(UserError, match=rf"cannot read .*{file.rpartition('/')[2]}: Input/output error"):
        open_checkpoint(config).digest if file.startswith("vae") else load_tokenizer(config)


def test_a_file_that_cannot_be_looked_for_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(path=str(folder), device="cpu", loras=(LONG,))
    with pytest.raises(UserError, match=r"^cannot look for the LoRA x{80,200}: File name too long$"):
        find_loras(config)
    with pytest.raises(UserError, match=r"^cannot look for model\.single_file x{80,200}: File name too long$"):
        find_single_files(ModelConfig(path=str(folder), device="cpu", single_file=f"{LONG}.safetensors"))
    monkeypatch.setattr(Path, "is_file", _forbidden)
    for look in (lambda: find_adapter(folder), lambda: check_small_files(folder, "vae")):
        with pytest.raises(UserError, match=r"^cannot look for .*json: Permission denied$"):
            look()


def _forbidden(path: Path) -> bool:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))
