"""Puts what the installed command names by default into the library: the presets, and the weights of the embedded model."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NOT_SHIPPED = shutil.ignore_patterns("*.py", "__pycache__", "study", "families")


class BuildWithData(build_py):
    """Copies configs/ and tiny/, without its programs, to engine/shipped; an editable install reads them where they are."""

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "tiny"):
                target = Path(self.build_lib) / "engine" / "shipped" / folder
                shutil.copytree(folder, target, ignore=NOT_SHIPPED, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithData})
