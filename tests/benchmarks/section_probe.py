"""Sections of the GPU benchmark that fail: `python -m tests.benchmarks.section_probe FOLDER KIND=SECONDS ...`.

A process of its own, since sections are forked from it, and a fork is safe only where no other thread holds a lock.
"""

import argparse
import json
import os
import sys
import time
import types
from pathlib import Path

from benchmarks import gpu
from benchmarks.sections.bench import Bench


def fails(bench: Bench) -> None:
    """Raise after a figure."""
    bench.record("first", 1.0)
    raise RuntimeError("no such kernel\nand more")


def hangs(bench: Bench) -> None:
    """Do not end after a figure."""
    bench.record("first", 1.0)
    time.sleep(600)


def dies(bench: Bench) -> None:
    """Exit silently after a figure."""
    bench.record("first", 1.0)
    os._exit(7)


def main(folder: str, *limits: str) -> None:
    """Run each section into its own folder, and print the results of `run_section`."""
    gpu.GRACE, found = 0.5, []
    for kind, _, limit in (each.partition("=") for each in limits):
        module = types.ModuleType("benchmarks.sections.probe")
        vars(module)["run"] = {"fails": fails, "hangs": hangs, "dies": dies}[kind]
        sys.modules["benchmarks.sections.probe"] = module
        found.append(gpu.run_section("probe", argparse.Namespace(small=True, out=Path(folder) / kind), float(limit)))
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
