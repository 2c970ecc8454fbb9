"""VBench-Long on this machine: its parts, the environment of its processes, and checks before a start.

The processes run the user's own interpreter, offline: HOME is the weights folder, hubs are set to offline, and proxies point
to a closed port, so that a download fails at once instead of changing the results.
"""

import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.trees import read_json
from engine.files.whole import file_sha256
from evaluation.vbench.process import run_process
from evaluation.vbench.suites import checkout_commit
from evaluation.vbench.weights import missing_weights

DRIVER = Path(__file__).with_name("driver.py")
PROBE_SECONDS = 600.0

_LONG = Path("vbench2_beta_long")
_CHECKOUT_FILES = (
    _LONG / "__init__.py",
    _LONG / "VBench_full_info.json",
    *(
        _LONG / "configs" / f"{name}.yaml"
        for name in ("clip_length_mix", "slow_fast_params", "subject_mapping_table", "background_mapping_table")
    ),
    Path("vbench/__init__.py"),
)
# A closed port, at which every connection fails at once.
_NOWHERE = "http://127.0.0.1:9"
_DROPPED = (
    "PYTHON",
    "TORCH",
    "HF_",
    "TRANSFORMERS_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "VBENCH_",
    "VIRTUAL_ENV",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """How VBench-Long is run.

    Attributes:
        checkout: folder of the VBench checkout.
        python: interpreter of the environment that has its packages.
        weights: folder that is HOME while it runs; see `evaluation.vbench.weights`.
        device: `cuda` or `cpu`.
        gpus: indices of the GPUs that processes are spread over; if there are none, one process runs at a time.
        time_limit: seconds that one process may take.
        environment: that of this program; processes inherit it without variables of Python, torch and ranks.
    """

    checkout: Path
    python: Path
    weights: Path
    device: str
    gpus: tuple[int, ...]
    time_limit: float
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Facts found before the start: commit, hash of the sources, versions of the environment."""

    commit: str | None
    sources: str
    probe: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines results beside the videos."""
        # The driver holds the settings that VBench is called with, which affect scores too.
        asked = file_sha256(DRIVER)
        return {"commit": self.commit, "sources": self.sources, "driver": asked, "versions": self.probe["versions"]}


def preflight(evaluator: Evaluator, dimensions: Sequence[str], folder: Path) -> Bench:
    """Check checkout, weights and environment before anything is started; PreflightError lists every fault."""
    faults = [
        f"missing file: {evaluator.checkout / name}"
        for name in _CHECKOUT_FILES
        if not (evaluator.checkout / name).is_file()
    ]
    if faults:
        faults = [
            f"{len(faults)} files of a VBench checkout are missing, such as {faults[0].removeprefix('missing file: ')}"
        ]
    faults += missing_weights(evaluator.weights, dimensions)
    if not evaluator.python.is_file() or not os.access(evaluator.python, os.X_OK):
        raise PreflightError([f"--python {evaluator.python} is not an executable file", *faults])
    if faults:
        raise PreflightError(faults)
    probe = _probe(evaluator, dimensions, folder)
    if probe["error"] is not None:
        version = ".".join(map(str, probe["python"]))
        raise PreflightError([f"{evaluator.python} (Python {version}) cannot import VBench-Long: {probe['error']}"])
    for gpu in evaluator.gpus:
        visible_gpu(evaluator, gpu)
    if evaluator.device == "cuda" and not probe["cuda"]:
        raise PreflightError([f"torch of {evaluator.python} sees no GPU; choose --device cpu"])
    return Bench(commit=checkout_commit(evaluator.checkout), sources=sources(evaluator.checkout), probe=probe)


class PreflightError(UserError):
    """VBench cannot run; `details` has a line for each fault."""

    def __init__(self, details: Sequence[str]) -> None:
        self.details = tuple(details)
        what = details[0] if len(details) == 1 else f"{len(details)} things are missing or broken, listed above"
        super().__init__(f"VBench cannot run: {what}; see docs/vbench.md")


def environment(evaluator: Evaluator, gpu: int | None) -> dict[str, str]:
    """The environment of one process: offline, with the weights folder as its home."""
    kept = {key: value for key, value in evaluator.environment.items() if not key.startswith(_DROPPED)}
    cache = evaluator.weights / ".cache"
    kept |= {
        "HOME": str(evaluator.weights),
        "XDG_CACHE_HOME": str(cache),
        "TORCH_HOME": str(cache / "torch"),
        "VBENCH_CACHE_DIR": str(cache / "vbench"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONNOUSERSITE": "1",
    }
    kept |= {
        name: _NOWHERE for key in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy") for name in (key, key.upper())
    }
    kept |= {"no_proxy": "", "NO_PROXY": ""}
    if gpu is not None:
        kept["CUDA_VISIBLE_DEVICES"] = visible_gpu(evaluator, gpu)
    return kept


def visible_gpu(evaluator: Evaluator, gpu: int) -> str:
    """Map an index of `--gpus` to a name in CUDA_VISIBLE_DEVICES; UserError if there are fewer."""
    given = evaluator.environment.get("CUDA_VISIBLE_DEVICES")
    if not given:
        return str(gpu)
    names = given.split(",")
    if gpu >= len(names):
        raise UserError(f"--gpus has {gpu}, and CUDA_VISIBLE_DEVICES leaves {len(names)}: {given}; count from 0")
    return names[gpu].strip()


def _probe(evaluator: Evaluator, dimensions: Sequence[str], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "environment.json"
    out.unlink(missing_ok=True)
    command = [*driver(evaluator, "probe", out), "--dimension", *dimensions]
    ended = run_process(
        command,
        env=environment(evaluator, None),
        log=folder / "logs" / "probe.log",
        time_limit=PROBE_SECONDS,
        stop=threading.Event(),
    )
    if ended is not None:
        raise PreflightError([f"{evaluator.python} {ended}"])
    found = read_json(out) if out.is_file() else None
    if found is None or "error" not in found:
        raise PreflightError([f"{evaluator.python} ended well but reported nothing; is it a Python?"])
    return found


def driver(evaluator: Evaluator, verb: str, out: Path) -> list[str]:
    words = [str(evaluator.python), str(DRIVER), verb, "--checkout", str(evaluator.checkout.absolute())]
    return [*words, "--out", str(out.absolute()), "--parent", str(os.getpid())]


def sources(checkout: Path) -> str:
    """Hash the code and tables of VBench-Long and the code of VBench, which decide scores."""
    files = sorted(
        path
        for part in (_LONG, Path("vbench"))
        for kind in ("py", "yaml")
        for path in (checkout / part).rglob(f"*.{kind}")
    )
    rows = "".join(f"{path.relative_to(checkout)}\t{file_sha256(path)}\n" for path in files)
    return hashlib.sha256(rows.encode()).hexdigest()
