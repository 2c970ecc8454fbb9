"""The demonstration, `python launch/demo.py`: one prompt and seed with three methods, one picture of all three, and a timeline."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is started from

from launch.cli.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("demo"))
