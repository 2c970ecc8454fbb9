"""Peak memory of a dual step against a global step, at full size, on tensors that have shapes and no numbers.

python -m benchmarks.memory

What is counted is what the step's operators make: inputs and weights are given apart. Wan's blocks are all alike, and a
block's buffers are free when the next one starts, so one block shows the peak of all.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.measure import RESULTS, environment, print_table, write
from engine.adapters.wan_published import PUBLISHED
from engine.planner.model import ModelSpec
from parallel.shards import Mode
from tests.engine.test_planner import LONG, RANK, fake_forward, make_layout
from tests.parallel.memory import LiveBytes

LAYOUTS = ((1, 1), (1, 4), (8, 1))  # ring x ulysses
MODES: tuple[Mode, ...] = ("global", "local", "dual")
GIB = 2**30


def peaks(spec: ModelSpec, ring: int, ulysses: int, modes: tuple[Mode, ...] = MODES) -> dict[str, float]:
    """GiB at the worst moment of a forward of one block in bf16, by mode; in a fake world of 8 ranks."""
    found = {}
    for mode in modes:
        layout = make_layout(spec, LONG, ring, ulysses, window=21, itemsize=2)
        run = fake_forward(layout, mode, "cpu_flash", layers=1)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), LiveBytes() as live:
            run()
        found[mode] = live.peak / GIB
    return found


def measure() -> list[dict[str, Any]]:
    """Both Wan models in three layouts."""
    rows = []
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=8)
    try:
        for name, configs in PUBLISHED.items():
            spec = ModelSpec(name=name, source="published", configs=configs)
            weights = spec.weight_bytes(2)["transformer"] / GIB
            for ring, ulysses in LAYOUTS:
                found = peaks(spec, ring, ulysses)
                ratio = {
                    "dual / global": found["dual"] / found["global"],
                    "with weights": (weights + found["dual"]) / (weights + found["global"]),
                }
                rows.append(
                    {
                        "model": name,
                        "ring": ring,
                        "ulysses": ulysses,
                        "weights_gib": weights,
                        "gib": found,
                        "ratios": ratio,
                    }
                )
    finally:
        dist.destroy_process_group()
    return rows


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    where = environment(torch.device("cpu"), "tensors without numbers: the same on any machine")
    rows = measure()
    print_table(
        ["model", "ring x ulysses", "global GiB", "local GiB", "dual GiB", "dual / global", "with weights"],
        [
            [
                row["model"],
                f"{row['ring']} x {row['ulysses']}",
                *(f"{row['gib'][mode]:.2f}" for mode in MODES),
                *(f"{value:.3f}" for value in row["ratios"].values()),
            ]
            for row in rows
        ],
    )
    where["load_average_end"] = os.getloadavg()[0]
    print(
        f"wrote {write(args.results, 'memory', where, {'dtype': 'bfloat16', 'kernel': 'cpu_flash', 'repeats': 1}, rows)}"
    )


if __name__ == "__main__":
    main()
