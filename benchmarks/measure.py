"""Shapes, interleaved timing, and the file of a benchmark with its environment."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.record import describe_device
from freespec.attention import WindowedAttention
from freespec.kernels import Kernel
from freespec.methods import Grid

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
QKV = tuple[Tensor, Tensor, Tensor]
Times = Mapping[str, Mapping[str, Sequence[float]]]  # by variant and clock, as `round_robin` measures them
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One self-attention layer over a long video; a CPU measures `cpu_heads` of its heads."""

    num_frames: int
    frame_tokens: int
    window_frames: int
    heads: int
    head_dim: int
    cpu_heads: int

    @property
    def num_tokens(self) -> int:
        """S."""
        return self.num_frames * self.frame_tokens

    @property
    def grid(self) -> Grid:
        """Its grid in one row; the fusion does not depend on rows and columns."""
        return Grid(frames=self.num_frames, rows=1, columns=self.frame_tokens, window_frames=self.window_frames)

    def windowed(self, kernel: Kernel, **kernels: Any) -> WindowedAttention:
        """The layer's attention with this kernel; `kernels` are other arguments of WindowedAttention."""
        return WindowedAttention(
            num_frames=self.num_frames,
            frame_tokens=self.frame_tokens,
            window_frames=self.window_frames,
            kernel=kernel,
            **kernels,
        )

    def draw(self, device: torch.device, dtype: torch.dtype, heads: int | None = None) -> QKV:
        """Normally distributed q, k, v [1, S, N, D], the same on every call."""
        draw = torch.Generator(device).manual_seed(0)
        sizes = (3, 1, self.num_tokens, heads or self.heads, self.head_dim)
        q, k, v = torch.randn(sizes, generator=draw, device=device, dtype=dtype).unbind(0)
        return q, k, v

    def __str__(self) -> str:
        return f"{self.num_frames} x {self.frame_tokens}, window {self.window_frames}"


SHAPES = {
    "tiny": Shape(num_frames=33, frame_tokens=64, window_frames=9, heads=6, head_dim=32, cpu_heads=6),
    "ltx": Shape(num_frames=61, frame_tokens=330, window_frames=16, heads=32, head_dim=64, cpu_heads=4),
    # Wan's frames in a shorter video, with about Wan's share of the window: a head of the full one takes minutes on a CPU.
    "wan-short": Shape(num_frames=33, frame_tokens=1560, window_frames=9, heads=12, head_dim=128, cpu_heads=1),
    "wan": Shape(num_frames=81, frame_tokens=1560, window_frames=21, heads=12, head_dim=128, cpu_heads=1),
}
ON_CPU = ("tiny", "ltx", "wan-short")


def parser(description: str, *, repeats: int = 7) -> argparse.ArgumentParser:
    """The arguments of every CPU benchmark."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=repeats, help="rounds, each of which runs every variant once")
    result.add_argument("--note", default="", help="what else the machine was doing; kept in the file")
    result.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    return result


def layer_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark of attention layers."""
    result = parser(description)
    result.add_argument("--kernel", default="auto", help="attention kernel")
    result.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(ON_CPU))
    result.add_argument("--heads", type=int, help="heads to measure instead of the shape's own number")
    return result


def run(
    benchmark: str,
    args: argparse.Namespace,
    measurements: Iterable[Any],
    show: Callable[[dict[str, Any]], str],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the file of a CPU benchmark after every measurement, since a long one may be stopped, and print its tables.

    `settings` are read at each writing: a measurement may add to them.
    """
    where, results = environment(CPU, args.note), []
    for found in measurements:
        results.append(found)
        where["load_average_end"] = os.getloadavg()[0]
        own = {"dtype": "float32", "kernel": getattr(args, "kernel", "auto"), "repeats": args.repeats, **settings}
        path = write(args.results, benchmark, where, own, results)
    print(f"{show({'settings': own, 'results': results})}\n\nwrote {path}")


def over_and_under(times: Times, over: str, under: str) -> dict[str, Any]:
    """The ratio of two variants of `round_robin` on both clocks."""
    return {unit: ratio(times[over][unit], times[under][unit]) for unit in ("wall_s", "cpu_s")}


def layer_result(
    name: str,
    heads: int,
    times: Times,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    pairs: Iterable[tuple[str, str]],
) -> dict[str, Any]:
    """The result of one shape: times of the variants beside what else was found of each, and the ratios of the pairs."""
    shape = SHAPES[name]
    return {
        "shape": name,
        "sizes": str(shape),
        "heads": heads,
        "head_dim": shape.head_dim,
        "variants": {
            variant: {unit: spread(seconds) for unit, seconds in times[variant].items()} | found
            for variant, found in variants.items()
        },
        "ratios": {f"{over} / {under}": over_and_under(times, over, under) for over, under in pairs},
    }


def round_robin(
    variants: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each variant, in rounds A B C C B A, so that other load on the machine affects all of them.

    Every other round runs backwards, so that no variant always follows the one that heats the device or empties its caches. The caller warms up.
    CPU seconds count the threads of this process alone.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in variants}
    for round_ in range(repeats):
        for name, call in in_turn(variants.items(), round_):
            _synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            _synchronize(device)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name]["wall_s"].append(wall)
            times[name]["cpu_s"].append(cpu)
    return times


def in_turn(items: Iterable[Item], round_: int) -> list[Item]:
    """The items of a round in their order, or, in every other round, backwards."""
    ordered = list(items)
    return ordered[::-1] if round_ % 2 else ordered


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median and spread of the ratio within each round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact result."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def environment(device: torch.device, note: str) -> dict[str, Any]:
    """Hardware, versions, date, revision and load."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else describe_device(device)["name"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "git_revision": _git_revision(),
        "load_average": os.getloadavg()[0],
        "note": note,
    }


def _git_revision() -> str | None:
    """The commit, with `-dirty` if files other than results and their pages differ from it."""
    own = (":(exclude)benchmarks/results", ":(exclude)docs/performance.md", ":(exclude)docs/predictions.md")
    try:
        commit = _git("rev-parse", "--short=12", "HEAD").strip()
        return f"{commit}-dirty" if _git("status", "--porcelain", "--", ".", *own) else commit
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None  # no git, or not a checkout: the file says so


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout


def write(folder: Path, benchmark: str, where: dict[str, Any], settings: dict[str, Any], results: list[Any]) -> Path:
    """benchmarks/results/<benchmark>-<device>-<date>.json; a later run of the same day replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{where['device']}-{where['date']}.json"
    content = {"benchmark": benchmark, "environment": where, "settings": settings, "results": results}
    path.write_text(json.dumps(rounded(content), indent=1) + "\n")
    return path


def rounded(value: Any) -> Any:
    """Every float of a tree to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
