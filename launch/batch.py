"""Makes a suite of prompts with several methods and seeds, on this machine or a Ray cluster; `--help` lists every setting."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("batch", ranks_by_script=False))
