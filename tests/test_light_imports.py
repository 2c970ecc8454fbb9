"""Settings are read and checked without torch, which takes seconds to import: a mistake is answered at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from freespec import kernels
from freespec.kernel_names import FA3, NAMES
from launch.cli.start import COMMANDS
from tests.test_layering import ROOT, module_name

HEAVY = ("torch", "diffusers", "transformers", "numpy", "matplotlib")


def loaded_by(code: str) -> list[str]:
    """Which of HEAVY a fresh Python has loaded after `code`."""
    shown = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "module", ["engine", "engine.config", "engine.errors", "freespec", "freespec.methods", "launch.cli.parser"]
)
def test_settings_need_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}") == []


def test_evaluation_needs_no_model() -> None:
    modules = [module_name(path) for path in sorted((ROOT / "evaluation").rglob("*.py"))]
    assert "evaluation.comparison.store" in modules
    code = "\n".join(f"import {module}" for module in modules)
    assert not {"torch", "diffusers", "transformers"} & {*loaded_by(code)}


def test_negative_control_torch_import() -> None:
    assert "torch" in loaded_by("from engine import apply_method")


def test_every_kernel_has_a_name() -> None:
    assert (*kernels.KERNELS, FA3) == NAMES


# What is wrong, and how it is said. Each is one line, and no torch was imported to say it.
MISTAKES = {
    "generate --nonsense": "unknown setting nonsense",
    "generate --config tiny-ltx": "give one of --prompt TEXT, --timeline EVENTS and --prompts FILE",
    "generate --prompt x --video.num_frames many": "video.num_frames must be a whole number, got 'many'",
    "generate --prompt x --method.name magic": "unknown method 'magic'",
    "generate --prompt x --method.freespec.alpha -1": "alpha must be a finite number, 0 or more, got -1",
    "generate --prompt x --config nowhere.yaml": "--config nowhere.yaml does not exist",
    "generate --prompt x --model.path /nowhere": "model.path '/nowhere' is neither a folder here",
    "generate --prompt x --nproc 0": "--nproc must be 1 or more",
    "generate --prompt x --nproc 2 --video.fps 0": "video.fps must lie in [1, 1000], got 0",
    "generate --prompt x --ray local --video.fps 0": "video.fps must lie in [1, 1000], got 0",
    "generate --prompts /nowhere": "cannot read --prompts /nowhere",
    "generate --prompt x --output.path a.avi": "output.path must end in .mp4",
    "plan --gpu abacus": "unknown GPU 'abacus'",
    "plan --gpus many": "gpus must be a whole number",
    "batch": "--prompts is missing",
    "batch --prompts /nowhere --out o": "cannot read --prompts /nowhere",
    "batch --prompts /nowhere --out o --methods magic": "unknown method 'magic'",
    "batch --status /nowhere": "/nowhere holds no batch",
    "serve --folder o --host 0.0.0.0": "--host 0.0.0.0 accepts other machines, which requires --api_key_file FILE",
    "decode": "give the file of the latents",
    "previews": "--out must name the file of the factors, such as previews.safetensors, got None",
    "previews --out a.safetensors --num_prompts 0": "--num_prompts must lie in [1, 40]",
    "decode a.safetensors": "give the file of the video: --output PATH",
    "compare": "give one of --prompt TEXT, --timeline EVENTS and --prompts FILE",
    "compare --prompt x --methods direct,magic": "unknown method 'magic'",
    "analyze --prompt x --ratios many": "--ratios must be numbers",
    "calibrate --rounds 1": "--prompts is needed",
    "evaluate": "give either --runs FOLDER",
    "evaluate --runs a --dimensions beauty": "beauty",
    "findings --kept /nowhere": "--kept /nowhere is not a folder",
    "findings --make magic": "--make magic is not a part of the study: analysis, videos, steps, calibration",
    "findings --study /nowhere": "cannot read --study /nowhere",
    "demo --prompt": "--prompt needs a value",
    "demo --methods direct": "unknown setting methods; this command does not use it; leave it out",
    "decode nowhere.safetensors --output a.mp4": "nowhere.safetensors does not exist",
    "evaluate --runs /nowhere": "--runs /nowhere is not a folder",
    "evaluate --videos /nowhere.csv": "cannot read --videos /nowhere.csv",
    "evaluate --runs . --vbench . --python x --device gpu": "--device must be cuda or cpu, got 'gpu'",
    "plan --gpus 0": "cannot plan for 0 GPUs; give 1 to 1024",
    "batch --prompts configs/prompts/batch-demo.txt --out o --seeds 0,0": "--seeds needs at least one entry and no duplicates",
    "analyze --prompt x --ratios 2": "a ratio must lie in (0, 1], got 2.0",
    "generate --prompt x --model.single_file a.ckpt": "model.single_file a.ckpt is a pickle",
    "generate --prompt x --model.single_file a.txt": "model.single_file must be a .safetensors or a .gguf file",
    "generate --prompt x --model.loras [a.pt@2]": "the LoRA a.pt is a pickle",
    "generate --prompt x --sampler.timesteps [1000,500]": "sampler.num_steps is 20 and sampler.timesteps are 2; leave num_steps",
    "generate --timeline bad": "--timeline 'bad' has no range",
    "generate --prompt x --given first=gone.png": "cannot read the picture gone.png: No such file",
    "generate --prompt x --extend gone.mp4": "cannot read --extend gone.mp4: No such file",
    "compare --prompt x --methods direct:nowhere.yaml": "--config nowhere.yaml does not exist",
}


def run_here(name: str, argv: list[str], tmp_path: Path) -> tuple[str, str, str]:
    """Output and errors of a command, and its exit code with those of HEAVY that it has imported."""
    code = (
        "import sys\nfrom launch.cli.console import run\n"
        f"try:\n    code = run({[name, *argv]!r})\nexcept SystemExit as error:\n    code = error.code\n"
        f"print(code, *(name for name in {HEAVY!r} if name in sys.modules), file=open({str(tmp_path / 'end')!r}, 'w'))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    return ended.stdout, ended.stderr, (tmp_path / "end").read_text().strip()


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_without_torch(command: str, tmp_path: Path) -> None:
    name, *argv = command.split()
    out, err, end = run_here(name, argv, tmp_path)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert MISTAKES[command] in err
    assert (out, end) == ("", "2")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name: str, tmp_path: Path) -> None:
    out, err, end = run_here(name, ["--help"], tmp_path)
    assert "usage:" in out
    assert (err, end) == ("", "0")


def test_a_batch_that_had_nothing_to_make_is_one(tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text("{}")
    out, err, end = run_here("batch", ["--status", str(tmp_path)], tmp_path)
    assert out == f"{tmp_path} has a batch but no status: no driver has started an item yet\n"
    assert (err, end) == ("", "0")


def test_the_status_of_a_batch_needs_no_torch(tmp_path: Path) -> None:
    status = {"time": 0, "host": "x", "pid": 1, "state": "done", "seconds": 5.0, "eta": None, "failures": []}
    replica = {"name": "replica-0", "state": "placing", "seconds": 4.0, "item": None, "step": 0, "total": 0, "done": 2}
    status |= {"counts": {"done": 2, "running": 0}, "replicas": [replica]}
    (tmp_path / "status").mkdir()
    (tmp_path / "status/shard-1-of-1.json").write_text(json.dumps(status))
    out, err, end = run_here("batch", ["--status", str(tmp_path)], tmp_path)
    assert out.startswith("shard-1-of-1: done; 2 items: 2 done, 0 running; 5.0 s so far")
    assert (err, end) == ("", "0")
