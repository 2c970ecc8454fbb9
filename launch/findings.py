"""Writes docs/findings.md from what `make findings` measured: `python launch/findings.py --runs runs/findings`."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("findings", ranks_by_script=False))
