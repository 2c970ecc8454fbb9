"""The demonstration: one prompt and seed with each method, and one picture of all three: `python launch/demo.py`."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("demo"))
