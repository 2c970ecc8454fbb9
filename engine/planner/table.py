"""The table of predictions that the documentation shows: models, GPUs, numbers of ranks."""

from collections.abc import Sequence
from typing import Any

from engine.config import ModelConfig, RunConfig
from engine.planner.gpu import GpuSpec
from engine.planner.memory import GIB
from engine.planner.model import read_model
from engine.planner.plan import Options, plan


def predicted_table(
    configs: Sequence[RunConfig], gpus: Sequence[GpuSpec], *, world_sizes: Sequence[int] = (1, 2, 4, 8)
) -> list[dict[str, Any]]:
    """One row per configuration, GPU and number of ranks, for the best degrees: everything in it is predicted.

    Keys: model, num_frames, gpu, gpus, degrees, fits, peak_gib, weights_gib, text_gib, decode_mode, seconds_decode, and for
    each method NAME that these degrees serve seconds_NAME (denoising) and efficiency_NAME.
    """
    rows = []
    for config in configs:
        spec = read_model(ModelConfig(path=config.model.path, revision=config.model.revision))
        for gpu in gpus:
            for world_size in world_sizes:
                options = Options.of(config)
                best = plan(
                    spec, config.video, config.sampler, config.method, gpu=gpu, world_size=world_size, options=options
                )[0]
                row = {"model": spec.name, "gpu": gpu.name, "gpus": world_size, "degrees": best.name, "fits": best.fits}
                row |= {"num_frames": config.video.num_frames, "peak_gib": best.peak_bytes / GIB}
                row |= {"weights_gib": best.memory["weights"] / GIB, "text_gib": best.memory["text_encoder"] / GIB}
                row |= {"decode_mode": best.decode_mode, "seconds_decode": best.decode_seconds}
                row |= {f"seconds_{name}": seconds for name, seconds in best.run_seconds.items()}
                row |= {f"efficiency_{name}": share for name, share in best.efficiency.items()}
                rows.append(row)
    return rows
