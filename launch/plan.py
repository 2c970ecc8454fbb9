"""Predicts memory and time of a run on some GPUs: `python launch/plan.py --gpus 8 --gpu h200`; `--help` lists every setting."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is started from

from launch.cli.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("plan"))
