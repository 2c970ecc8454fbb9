"""Commands: read argv and the environment, start ranks, run the engine."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - before any file that an older Python cannot read
    sys.exit(
        "error: Python 3.11 or newer is needed, and {} is {}.{}; run `make setup PYTHON=python3.12` and use "
        ".venv/bin/python".format(sys.executable, *sys.version_info[:2])
    )
