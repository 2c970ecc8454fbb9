"""Builds the library: with the presets and the weights of the embedded model, without the commands that need evaluation/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NOT_SHIPPED = shutil.ignore_patterns("*.py", "__pycache__", "study", "families")


# Commands that measure videos, with evaluation/ and metrics/ of a checkout: their scripts, arguments and implementations.
STUDIES = ("analyze", "calibrate", "compare", "evaluate", "findings")
NEED_CHECKOUT = {(package, name) for package in ("launch", "launch.arguments", "launch.commands") for name in STUDIES}
NEED_CHECKOUT |= {("launch.batching", "comparison")}


class BuildLibrary(build_py):
    """Copies configs/ and tiny/, without its programs, to engine/shipped; an editable install reads them where they are."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Find the modules to install: those that work without a checkout."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if self.editable_mode or module[:2] not in NEED_CHECKOUT]

    def run(self) -> None:
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "tiny"):
                target = Path(self.build_lib) / "engine" / "shipped" / folder
                shutil.copytree(folder, target, ignore=NOT_SHIPPED, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildLibrary})
