"""Searches FreeSpec's open settings on one list of prompts and judges them on another; `--help` lists every setting."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("calibrate"))
