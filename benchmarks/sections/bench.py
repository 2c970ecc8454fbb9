"""The context of a section: device, sizes, time left, and a file that is rewritten after every figure."""

import importlib.metadata
import importlib.util
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.attention import peak_memory
from benchmarks.measure import SHAPES, Shape, environment, in_turn, rounded
from engine.errors import first_line
from engine.kernel_choice import choose_solver
from engine.ranks.group_of_one import GROUP_OF_ONE
from engine.record import versions_of
from freespec.kernels import NAMES, Kernel, select_kernel

# Sizes of --small: the same code on a CPU, in seconds.
SMALL_SHAPES = {
    "wan": Shape(num_frames=5, frame_tokens=10, window_frames=3, heads=2, head_dim=16, cpu_heads=2),
    "ltx": Shape(num_frames=6, frame_tokens=5, window_frames=4, heads=2, head_dim=8, cpu_heads=2),
}
# What torch, Triton and other packages raise for an unsupported device, dtype or layout.
UNSUPPORTED: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    TypeError,
    ImportError,
    AssertionError,  # raised by packages and torch's compiler for a shape
    torch.OutOfMemoryError,
)
if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError

    UNSUPPORTED += (TritonError,)
CLOCKS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"
PACKAGES = ("torch", "triton", "diffusers", "flash-attn", "flash-attn-3", "xfuser", "sageattention")
Result = TypeVar("Result")


@dataclass
class Bench:
    """One section's run.

    Attributes:
        section: its name, and the stem of its file.
        device: what is measured.
        small: tiny sizes, for a CPU.
        out: folder of the files.
        deadline: of `time.monotonic`, when a section should have finished; it is ended some seconds later.
    """

    section: str
    device: torch.device
    small: bool
    out: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU, fp32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def repeats(self) -> int:
        """Rounds of a comparison."""
        return 2 if self.small else 5

    @property
    def shapes(self) -> dict[str, Shape]:
        """Self-attention of Wan2.1-1.3B at 321 frames and of LTX-2B at 481; or tiny."""
        return SMALL_SHAPES if self.small else {name: SHAPES[name] for name in ("wan", "ltx")}

    def has_time(self, seconds: float) -> bool:
        """Whether this many seconds are left."""
        return self.deadline - time.monotonic() > seconds

    def start(self) -> None:
        """Record the environment."""
        self.about = environment(self.device, "") | {"packages": versions_of(PACKAGES), "clocks_before": clocks()}
        self.write("running")

    def record(self, name: str, value: Any) -> Any:
        """Add a result and write the file."""
        self.results[name] = value
        self.write("running")
        return value

    def write(self, status: str, **more: Any) -> None:
        """The file of this section so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": "gpu",
            "section": self.section,
            "status": status,
            "environment": self.about,
            "settings": {"small": self.small, "dtype": str(self.dtype).removeprefix("torch."), "repeats": self.repeats},
            "results": self.results,
            **more,
        }
        text = json.dumps(rounded(content), indent=1) + "\n"
        path = self.out / f"{self.section}.json"
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)  # a section that is killed leaves a complete file

    def attempt(self, call: Callable[[], Result]) -> tuple[Result | None, str]:
        """Return the result, or None and a line with why this device does not support it; its memory is freed."""
        try:
            return call(), ""
        except UNSUPPORTED as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.empty_cache()
            return (
                None,
                f"{type(error).__name__}: {first_line(error)[:200]} ({Path(where.filename).name}:{where.lineno})",
            )

    def kernels(self) -> tuple[dict[str, Kernel], dict[str, str]]:
        """The dense kernels of this device, without the plain one on a GPU, and why others are left out."""
        found, refused = {}, {}
        for name in NAMES:
            if name == "plain" and not self.small:
                refused[name] = "writes out S x K logits"
                continue
            kernel, why = self.attempt(lambda name=name: select_kernel(name, self.device, self.dtype))
            if kernel is None:
                refused[name] = why
            else:
                found[name] = kernel
        return found, refused

    def earlier(self, section: str) -> dict[str, Any]:
        """The results of a section that ran before; {} if it did not, or on another device."""
        path = self.out / f"{section}.json"
        if not path.exists():
            return {}
        content = json.loads(path.read_text())
        same = content["environment"].get("device_name") == self.about.get("device_name")
        return content["results"] if same else {}

    def best_kernel(self) -> str:
        """The dense kernel that was fastest in section `layer`; `auto` if it was not measured."""
        variants = self.earlier("layer").get("wan", {}).get("variants", {})
        found = {name: variants.get(f"global {name}", {}).get("wall_s", {}).get("median") for name in NAMES}
        measured = {name: seconds for name, seconds in found.items() if seconds is not None}
        return min(measured, key=lambda name: measured[name]) if measured else "auto"

    def rounds(self, calls: Mapping[str, Callable[[], Any]], add_time: Callable[[str, float], None]) -> None:
        """Time every call once a round, in rounds A B C C B A; `add_time(name, seconds)` is called after each."""
        for round_ in range(self.repeats):
            for name, call in in_turn(calls.items(), round_):
                add_time(name, self.seconds_and_peak(call)["seconds"])

    def choose_solver(self, shape: Shape) -> None:
        """Choose the eigensolver as an engine would for this layer; a CPU has one."""
        mesh = GROUP_OF_ONE.acquire()
        sizes = {"num_matrices": 2 * shape.heads, "rows": shape.head_dim}
        self.about["eigensolver"] = choose_solver(mesh, **sizes, device=self.device).solver
        GROUP_OF_ONE.release()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Empty the cache, so that a peak belongs to one variant."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds_and_peak(self, call: Callable[[], Any]) -> dict[str, float]:
        """Seconds of one call, and on a GPU the most memory that was allocated meanwhile, in GiB."""
        cuda = self.device.type == "cuda"
        self.synchronize()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        call()
        self.synchronize()
        result = {"seconds": time.perf_counter() - started}
        if cuda:
            result["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return result


@dataclass(kw_only=True)
class ShapeRun:
    """Results of one shape's variants so far, written after every figure.

    Attributes:
        bench: the section.
        name: the model.
        shape: its layer.
        times: seconds of each round, by variant.
        checked: peak memory, and for some errors against fp64, by variant.
        left_out: variants that do not run here or were not started, and why.
    """

    bench: Bench
    name: str
    shape: Shape
    times: dict[str, list[float]] = field(default_factory=dict)
    checked: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def found(self) -> dict[str, Any]:
        """The results of the shape."""
        raise NotImplementedError

    def write(self) -> None:
        """All of it, to the section's file."""
        self.bench.record(self.name, self.found() | {"left_out": self.left_out})

    def add_time(self, name: str, seconds: float) -> None:
        """Note the time of a call."""
        self.times.setdefault(name, []).append(seconds)
        self.write()

    def check(self, name: str, call: Callable[[], Any], look: Callable[[Callable[[], Any]], dict[str, Any]]) -> bool:
        """Call a variant once and keep what `look` finds, or why it does not run; True if it runs."""
        found, why = self.bench.attempt(
            lambda: (call(), look(call))[1]
        )  # the first call compiles, and picks algorithms
        if found is None:
            self.left_out[name] = why
        else:
            self.checked[name] = found
        self.write()
        return found is not None

    def peak(self, call: Callable[[], Any]) -> dict[str, Any]:
        """The memory of a call, for `check`."""
        return {"peak_extra_mib": peak_memory(call, self.bench.device)[0]}


def clocks() -> dict[str, str] | None:
    """The first GPU's clocks, power and temperature from nvidia-smi; None without it."""
    command: Sequence[str] = ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return dict(zip(CLOCKS.split(","), lines[0].split(", "), strict=False)) if lines else None
