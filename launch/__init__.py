"""Commands: read argv and the environment, start ranks, run the engine."""

import os.path
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before any file that an older Python cannot read
    sys.exit(
        "error: Python 3.11 or newer is needed, and {} is {}.{}; run `make setup PYTHON=python3.12` and use "
        ".venv/bin/python".format(sys.executable, *sys.version_info[:2])
    )

# A script in launch/ puts this folder first on the import path, where `plan`, `decode` and others would shadow modules of those names. In
# a checkout its parent has evaluation/ and metrics/.
_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
sys.path[:] = [place for place in sys.path if os.path.abspath(place) != _here]  # noqa: PTH100
if os.path.dirname(_here) not in sys.path:  # noqa: PTH120
    sys.path.append(os.path.dirname(_here))  # noqa: PTH120
