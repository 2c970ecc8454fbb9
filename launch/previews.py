"""Fits the colours of previews to a VAE, from a few videos of its model; `--help` lists every setting."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is started from

from launch.cli.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("previews"))
