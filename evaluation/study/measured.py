"""A video of a study with its measures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Files(Protocol):
    """Files of one video."""

    @property
    def video(self) -> Path:
        """The video itself."""


class StudyVideo(Protocol):
    """One video of a study: a prompt and a seed, made by one variant."""

    @property
    def label(self) -> str:
        """Label of the variant."""

    @property
    def prompt_index(self) -> int:
        """Place in the list of prompts."""

    @property
    def prompt(self) -> str:
        """Text of the prompt."""

    @property
    def seed(self) -> int:
        """Seed of the noise."""

    @property
    def files(self) -> Files:
        """Its files."""

    @property
    def is_done(self) -> bool:
        """Whether its file exists and is complete."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A video with its record and its measures.

    Attributes:
        video: which.
        record: what `launch/generate.py` would write beside it.
        values: measures by name; nan where a video has none.
        by_clip: measures per clip of native length.
        version: `evaluation.events.version_of` its prompt when the measures were made.
    """

    video: StudyVideo
    record: dict[str, Any]
    values: dict[str, float]
    by_clip: dict[str, list[float]]
    version: str
