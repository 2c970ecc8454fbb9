"""The table of predictions that the documentation shows: models, GPUs, numbers of ranks."""

from collections.abc import Sequence
from typing import Any

from engine.config import ModelConfig, RunConfig
from engine.planner.gpu import GpuSpec
from engine.planner.memory import GIB
from engine.planner.model import read_model
from engine.planner.plan import Case, Plan, plan


def predicted_table(
    configs: Sequence[RunConfig], gpus: Sequence[GpuSpec], *, world_sizes: Sequence[int] = (1, 2, 4, 8)
) -> list[dict[str, Any]]:
    """One row per configuration, GPU and number of ranks, for the best degrees: everything in it is predicted.

    Keys: model, num_frames, gpu, gpus, degrees, fits, peak_gib, weights_gib, text_gib, decode_mode, seconds_decode, and for
    each method NAME that these degrees serve seconds_NAME (denoising) and efficiency_NAME. `elsewhere` has of every method that
    they do not serve the best degrees that do, if any fit, and its seconds there.
    """
    rows = []
    for config in configs:
        spec = read_model(ModelConfig(path=config.model.path, revision=config.model.revision))
        for gpu in gpus:
            for world_size in world_sizes:
                plans = plan(Case.of(config, spec, gpu=gpu, world_size=world_size))
                best = plans[0]
                row = {"model": spec.name, "gpu": gpu.name, "gpus": world_size, "degrees": best.name, "fits": best.fits}
                row |= {"num_frames": config.video.num_frames, "peak_gib": best.peak_bytes / GIB}
                row |= {"weights_gib": best.memory["weights"] / GIB, "text_gib": best.memory["text_encoder"] / GIB}
                row |= {"decode_mode": best.decode_mode, "seconds_decode": best.decode_seconds}
                row |= {f"seconds_{name}": seconds for name, seconds in best.run_seconds.items()}
                row |= {f"efficiency_{name}": share for name, share in best.efficiency.items()}
                rows.append(row | {"elsewhere": _served_elsewhere(plans)})
    return rows


def _served_elsewhere(plans: Sequence[Plan]) -> dict[str, tuple[str, float]]:
    """Degrees and seconds of each method that the first plan does not serve, of the fastest plan that serves it and fits."""
    found: dict[str, tuple[str, float]] = {}
    for p in filter(lambda p: p.fits, plans):
        for name in p.run_seconds.keys() - plans[0].run_seconds.keys():
            if name not in found or p.run_seconds[name] < found[name][1]:
                found[name] = p.name, p.run_seconds[name]
    return found
