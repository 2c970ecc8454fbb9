"""Keeps a model loaded and makes videos for clients of OpenAI's video API; `--help` lists every setting."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, wherever it is started from

from launch.cli.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("serve"))
