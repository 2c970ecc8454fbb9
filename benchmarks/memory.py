"""Peak memory of a dual step against a global step, at full size, on tensors without values.

python -m benchmarks.memory

Tensors that the step creates are counted; inputs and weights are not. The blocks are alike and free their buffers, so that one block has the
peak of all.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import tables
from benchmarks.measure import parser, run
from engine.adapters.wan_published import PUBLISHED
from engine.planner.model import ModelSpec
from parallel.shards import Mode
from tests.engine.test_planner import LONG, RANK, fake_forward, make_layout
from tests.parallel.memory import LiveBytes

MODELS = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
LAYOUTS = ((1, 1), (1, 4), (8, 1))  # ring x ulysses
MODES: tuple[Mode, ...] = ("global", "local", "dual")
GIB = 2**30


def peaks(spec: ModelSpec, ring: int, ulysses: int, modes: tuple[Mode, ...] = MODES) -> dict[str, float]:
    """Peak GiB of a forward of one block in bf16, by mode; in a fake world of 8 ranks."""
    found = {}
    for mode in modes:
        layout = make_layout(spec, LONG, ring, ulysses, window=21, itemsize=2)
        run = fake_forward(layout, mode, "cpu_flash", layers=1)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), LiveBytes() as live:
            run()
        found[mode] = live.peak / GIB
    return found


def measure() -> Iterator[dict[str, Any]]:
    """Both sizes of Wan2.1 in three layouts."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    try:
        for name in MODELS:
            spec = ModelSpec(name=name, source="published", configs=PUBLISHED[name])
            weights = spec.weight_bytes(2)["transformer"] / GIB
            for ring, ulysses in LAYOUTS:
                found = peaks(spec, ring, ulysses)
                yield {
                    "model": name,
                    "ring": ring,
                    "ulysses": ulysses,
                    "weights_gib": weights,
                    "gib": found,
                    "ratios": {
                        "dual / global": found["dual"] / found["global"],
                        "with weights": (weights + found["dual"]) / (weights + found["global"]),
                    },
                }
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Count, print and write."""
    args = parser(__doc__, repeats=1).parse_args()
    args.note = args.note or "tensors without values: the same on any machine"
    run("memory", args, measure(), tables.memory, {"dtype": "bfloat16", "kernel": "cpu_flash", "repeats": 1})


if __name__ == "__main__":
    main()
