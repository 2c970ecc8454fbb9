"""How much a video changes when FreeLOC treats one layer alone, and the treatment of each layer that follows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.media.read_video import read_frames
from evaluation.analysis.spectra import Rows, mean_and_error
from evaluation.comparison.measure import Measured
from evaluation.comparison.quality import score_of
from metrics.bootstrap import paired_interval

UNTREATED = "direct"
TREATMENTS = {"positions": "position_layers", "sparse": "sparse_layers"}


def layer_settings(num_layers: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Layers of each treatment for one layer alone, by label: `positions-00`, `sparse-00`, `positions-01`, ..; all others have neither."""
    neither: dict[str, tuple[int, ...]] = dict.fromkeys(TREATMENTS.values(), ())
    return {
        f"{treatment}-{layer:02d}": neither | {setting: (layer,)}
        for layer in range(num_layers)
        for treatment, setting in TREATMENTS.items()
    }


def layer_rows(measured: Sequence[Measured], *, world: bool) -> Rows:
    """For each video of one treated layer its change from the untreated one: of pixels and, in the embedded `world`, of the score.

    `change` is the mean absolute difference of pixels, in levels; `gain` is the difference in score, nan without a world.
    """
    untreated = {each.video.prompt_index: each for each in measured if each.video.label == UNTREATED}
    frames = {prompt: read_frames(each.video.files.video) for prompt, each in untreated.items()}
    rows: Rows = []
    for each in measured:
        if each.video.label == UNTREATED:
            continue
        prompt = each.video.prompt_index
        treatment, _, layer = each.video.label.partition("-")
        made = read_frames(each.video.files.video)
        change = float(np.mean(np.abs(made.astype(np.int16) - frames[prompt])))
        gain = score_of(each.values) - score_of(untreated[prompt].values) if world else math.nan
        rows.append({"treatment": treatment, "layer": int(layer), "prompt": prompt, "change": change, "gain": gain})
    return rows


def layer_summary(rows: Rows) -> Rows:
    """Means over prompts for each treatment and layer; `relative` is the change over the mean change of the treatment in all layers."""
    means = {}
    for row in rows:
        means.setdefault((row["treatment"], row["layer"]), []).append(row)
    summary: Rows = []
    for (treatment, layer), found in sorted(means.items()):
        change, error = mean_and_error([row["change"] for row in found])
        gain = np.array([row["gain"] for row in found])
        interval = paired_interval(gain, np.zeros_like(gain))
        summary.append(
            {"treatment": treatment, "layer": layer, "prompts": len(found), "change": change, "error": error}
            | {"gain": interval.mean, "low": interval.low, "high": interval.high}
        )
    for treatment in TREATMENTS:
        some = [row for row in summary if row["treatment"] == treatment]
        mean = float(np.mean([row["change"] for row in some]))
        for row in some:
            row["relative"] = row["change"] / mean if mean > 0 else 0.0
    return summary


def choose_layers(summary: Rows) -> dict[str, list[int]]:
    """Give each layer the treatment to which it is more sensitive: with the larger `relative`, positions if equal."""
    relative = {(row["treatment"], row["layer"]): row["relative"] for row in summary}
    layers = sorted({layer for _, layer in relative})
    sparse = [layer for layer in layers if relative["sparse", layer] > relative["positions", layer]]
    return {"position_layers": [layer for layer in layers if layer not in sparse], "sparse_layers": sparse}


def preset_of(chosen: Mapping[str, list[int]], *, checkpoint: Any, prompts: int) -> str:
    """A preset to lay over the model's."""
    tree = {"method": {"freeloc": dict(chosen)}}
    return (
        f"# Layers of checkpoint {checkpoint}, probed on {prompts} prompts. Laid over a model: --config MODEL.yaml --config THIS.\n"
        f"{yaml.safe_dump(tree, default_flow_style=None)}"
    )


def layer_file(folder: Path) -> Path:
    """The preset of an analysis."""
    return folder / "freeloc-layers.yaml"
