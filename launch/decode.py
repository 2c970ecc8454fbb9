"""Makes the video of saved latents: `python launch/decode.py LATENTS --output PATH`."""

import sys

from launch.start import run_script

if __name__ == "__main__":
    sys.exit(run_script("decode"))
