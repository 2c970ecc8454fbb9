"""Evaluates a batch with VBench-Long and weight-free proxies: `python launch/evaluate.py --runs runs/batch`; see docs/vbench.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is started from

from launch.cli.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))
