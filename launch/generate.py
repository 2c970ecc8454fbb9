"""Makes long videos from prompts: `python launch/generate.py --prompt "..."`; `--help` lists every setting."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("generate", on_ray=True))
