"""Effective rank of attention outputs at several windows: rows of each prompt, kept in files, and their means."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.batch.items import FILE, claim_folder
from engine.errors import UserError
from engine.files.checks import check_places
from engine.files.trees import DamagedError, Shape, lacking, read_json
from engine.files.whole import write_text
from engine.media.contact_sheet import spaced
from engine.shown import say_on_stderr
from evaluation.comparison.store import Comparison
from evaluation.comparison.summary import as_json
from metrics.bootstrap import mean_interval, paired_interval

Rows = list[dict[str, Any]]
STAGES = {"early": 0.1, "middle": 0.5, "late": 0.9}
"""Stages of Fig. 2b, as shares of the steps: the rank rises, nears its plateau, and has reached it."""

_ROW: Shape = dict.fromkeys(("prompt", "step", "layer", "head"), int) | dict.fromkeys(
    ("multiple", "progress", "effective_rank", "first_share"), int | float
)
_NUMBERS = ("effective_rank", "first_share")


@dataclass(frozen=True, kw_only=True)
class SpectraStore:
    """The rows of each prompt, in one file each: `spectra/p0000-sS-POINTS.json` in the folder of `watched`.

    Attributes:
        watched: videos of one variant and seed, which are denoised but not kept.
        num_points: number of steps to measure.
    """

    watched: Comparison
    num_points: int

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.watched.folder

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return self.watched.prompts

    @property
    def seed(self) -> int:
        """The seed of all prompts."""
        return self.watched.seeds[0]

    def open(self) -> None:
        """Create the folder and describe its content; UserError if it holds other spectra."""
        self.watched.check()
        check_places([self.folder / FILE, *(self.file(index) for index in range(len(self.prompts)))])
        claim_folder(self.folder, dataclasses.replace(self.watched.batch, items=()))

    def file(self, index: int) -> Path:
        """File of one prompt."""
        video = self.watched.videos[index]
        return video.files.folder / "spectra" / f"{video.item.name}-{self.num_points}.json"

    def describe(self) -> dict[str, Any]:
        """Describe everything that determines the spectra; see `Comparison.describe`."""
        described, config = self.watched.describe(), self.watched.config
        (method,) = described["variants"].values()
        own = {"sampler.noise": config.noise[0], "sampler.seed": self.seed, "num_points": self.num_points}
        return described | {"settings": described["settings"] | method | own, "variants": {}}

    @property
    def done(self) -> list[bool]:
        """Whether each prompt has its rows; prints a line for each damaged file."""
        return [self._rows(index) is not None for index in range(len(self.prompts))]

    def _rows(self, index: int) -> Rows | None:
        """Read the rows of one prompt; None if missing or damaged."""
        try:
            rows = read_json(self.file(index))
            if rows is None or (isinstance(rows, list) and rows and all(lacking(row, _ROW) is None for row in rows)):
                return rows
            reason = f"{self.file(index)} holds no spectra"
        except DamagedError as error:
            reason = error.reason
        say_on_stderr(f"{reason}; it is made again")
        return None

    @property
    def steps(self) -> list[int]:
        """The steps to measure."""
        return spaced(self.watched.config.sampler.num_steps, self.num_points)

    def snapshot(self, index: int) -> Path:
        """State of a prompt that is being denoised."""
        return self.file(index).with_suffix(".snapshot.safetensors")

    def keep(self, index: int, found: Rows, steps: Sequence[Mapping[str, Any]]) -> None:
        """Write what was measured while a prompt was denoised in `steps`, and delete its state."""
        timesteps = {step["step"]: step["timestep"] for step in steps}
        rows = [
            {"prompt": index, "timestep": timesteps[row["step"]], "progress": row["step"] / max(len(steps) - 1, 1)}
            | row
            for row in found
        ]
        self.file(index).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file(index), json.dumps(rows, allow_nan=False))
        self.snapshot(index).unlink(missing_ok=True)

    def read(self) -> Rows:
        """The rows of all prompts."""
        rows: Rows = []
        for index in range(len(self.prompts)):
            if (found := self._rows(index)) is None:
                raise UserError(f"{self.file(index)} cannot be read; start the same command again")
            rows += found
        return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, s / sqrt(n) with s the sample's standard deviation; the error is nan for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def over_prompts(rows: Rows, keys: Sequence[str]) -> Rows:
    """Mean and standard error over prompts for each value of `keys`; within a prompt such rows are averaged.

    Only prompts are independent, so heads, layers and steps do not reduce the error.
    """
    cells: dict[tuple, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), {}).setdefault(row["prompt"], []).append(row)
    found = []
    for cell, by_prompt in sorted(cells.items()):
        line = dict(zip(keys, cell, strict=True)) | {"prompts": len(by_prompt)}
        for name in _NUMBERS:
            means = [statistics.fmean(row[name] for row in of_prompt) for of_prompt in by_prompt.values()]
            line[f"{name}_mean"], line[f"{name}_error"] = mean_and_error(means)
        found.append(line)
    return found


def stages(rows: Rows) -> dict[str, float]:
    """Return the measured progress nearest to each stage."""
    seen = sorted({row["progress"] for row in rows})
    return {name: min(seen, key=lambda progress: abs(progress - share)) for name, share in STAGES.items()}


def by_layer_and_head(rows: Rows) -> np.ndarray:
    """[layers, heads]: mean effective rank at the widest window over that at the native one, less 1."""
    layers, heads = (1 + max(row[key] for row in rows) for key in ("layer", "head"))
    widest = max(row["multiple"] for row in rows)
    sums = {multiple: np.zeros((layers, heads)) for multiple in (1, widest)}
    for row in rows:
        if row["multiple"] in sums:
            sums[row["multiple"]][row["layer"], row["head"]] += row["effective_rank"]
    return sums[widest] / sums[1] - 1


def concentration(rows: Rows) -> dict[str, Any]:
    """Paired difference of the rank from the native window, per stage and window.

    Means over layers and heads, difference and bootstrap interval over prompts; `heads_that_fall` is the share of
    (layer, head) whose mean rank at the widest window is below that at the native one.
    """
    found: dict[str, Any] = {"stages": {}, "heads_that_fall": float((by_layer_and_head(rows) < 0).mean())}
    for name, progress in stages(rows).items():
        at_stage = [row for row in rows if row["progress"] == progress]
        native = _per_prompt(at_stage, lambda row: row["multiple"] == 1)
        lines = []
        for multiple in sorted({row["multiple"] for row in at_stage}):
            mine = _per_prompt(at_stage, lambda row, multiple=multiple: row["multiple"] == multiple)
            mean, difference = mean_interval(mine), paired_interval(mine, native)
            lines.append({"multiple": multiple, "mean": as_json(mean), "difference": as_json(difference)})
        found["stages"][name] = {"progress": progress, "windows": lines}
    return found


def _per_prompt(rows: Rows, chosen: Callable[[dict[str, Any]], bool]) -> np.ndarray:
    """[prompts]: mean effective rank of the chosen rows of each prompt."""
    by_prompt: dict[int, list[float]] = {}
    for row in rows:
        if chosen(row):
            by_prompt.setdefault(row["prompt"], []).append(row["effective_rank"])
    return np.array([statistics.fmean(values) for _, values in sorted(by_prompt.items())])
