"""Run the benchmarks of a CPU or of a GPU, and write the pages: `python -m benchmarks.every cpu`."""

import argparse
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
        "timeline --repeats 5",
    ),
    "gpu": ("gpu --out benchmarks/results/gpu",),
}


def main() -> None:
    """Run every command, each in a process; the exit status is that of the first that failed, whose figures before are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("device", choices=list(COMMANDS))
    commands = (*COMMANDS[parser.parse_args().device], "report")
    waiting = {"OMP_WAIT_POLICY": "passive"}  # or waiting threads would count as work
    codes = [
        subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{words}".split()], env=os.environ | waiting, check=False
        ).returncode
        for words in commands
    ]
    sys.exit(next(filter(None, codes), 0))


if __name__ == "__main__":
    main()
