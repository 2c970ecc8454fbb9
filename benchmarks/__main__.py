"""Run the benchmarks of a CPU or of a GPU, and write the pages: `python -m benchmarks cpu`."""

import os
import subprocess
import sys

COMMANDS = {
    "cpu": (
        "attention --shapes tiny ltx wan-short --repeats 2",
        "far --shapes tiny wan-short --repeats 1",
        "fusion --shapes tiny wan-short --no-dual wan-short --repeats 9",
        "parallel --shapes tiny --repeats 3",
        "memory",
        "timeline --repeats 3",
    ),
    "gpu": ("gpu --out benchmarks/results/gpu",),
}


def main() -> None:
    """Run every command, each in a process; the exit status is that of the first that failed, whose figures before are kept."""
    if len(sys.argv) != 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m benchmarks {'|'.join(COMMANDS)}")
    waiting = {"OMP_WAIT_POLICY": "passive"}  # or waiting threads would count as work
    codes = [
        subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{words}".split()], env=os.environ | waiting, check=False
        ).returncode
        for words in (*COMMANDS[sys.argv[1]], "report")
    ]
    sys.exit(next(filter(None, codes), 0))


if __name__ == "__main__":
    main()
