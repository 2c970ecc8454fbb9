"""Version of the code and libraries that determine a measure, to detect outdated kept values."""

import hashlib
import importlib.metadata
from pathlib import Path

import tiny.captions
import tiny.measure
import tiny.world

# Statistics of measures, separate sets of measures, and this file. Measures of events and of a video's course add their own source,
# so that those of other videos do not depend on it.
_OTHERS = ("bootstrap.py", "course.py", "events.py", "proxies.py", "version.py")
_PACKAGES = ("numpy", "opencv-python-headless", "scikit-image")


def source_digest(*more: Path, packages: tuple[str, ...] = ()) -> str:
    """SHA-256 over the sources of the measures and the versions of the libraries that they call, and over `more` of both."""
    digest = hashlib.sha256()
    files = sorted(file for file in Path(__file__).parent.glob("*.py") if file.name not in _OTHERS)
    for file in [*files, *(Path(module.__file__) for module in (tiny.captions, tiny.measure, tiny.world)), *more]:
        digest.update(file.read_bytes())
    for package in (*_PACKAGES, *packages):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()
