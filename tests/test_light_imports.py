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
    assert "torch" in loaded_by("import freespec.kernels")


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


# Every command in a fork of one process that has imported what all of them share.
RUNS = f"""
import json, os, sys
from pathlib import Path
from launch.cli import console, parser
for folder, words in json.load(sys.stdin).items():
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        try:
            code = console.run(words)
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        sys.stderr.flush()
        Path("end").write_text(" ".join([str(code), *(name for name in {HEAVY!r} if name in sys.modules)]))
        os._exit(0)
    os.waitpid(child, 0)
"""


def run_all(commands: dict[Path, list[str]]) -> None:
    """Run each command in its folder, with its output in `out` and `err`, and in `end` its exit code with those of HEAVY that it has imported."""
    given = json.dumps({str(folder): words for folder, words in commands.items()})
    subprocess.run([sys.executable, "-c", RUNS], input=given, text=True, check=True, cwd=ROOT)


def read_run(folder: Path) -> tuple[str, str, str]:
    """Output, errors and end of a command."""
    out, err, end = ((folder / name).read_text() for name in ("out", "err", "end"))
    return out, err, end


def run_here(name: str, argv: list[str], tmp_path: Path) -> tuple[str, str, str]:
    run_all({tmp_path: [name, *argv]})
    return read_run(tmp_path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """How every mistake and every `--help` ended."""
    folders = {
        command: tmp_path_factory.mktemp("run") for command in [*MISTAKES, *(f"{name} --help" for name in COMMANDS)]
    }
    run_all({folder: command.split() for command, folder in folders.items()})
    return {command: read_run(folder) for command, folder in folders.items()}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_answered_without_torch(command: str, ended: dict[str, tuple[str, str, str]]) -> None:
    out, err, end = ended[command]
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert MISTAKES[command] in err
    assert (out, end) == ("", "2")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_torch(name: str, ended: dict[str, tuple[str, str, str]]) -> None:
    out, err, end = ended[f"{name} --help"]
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
