"""The given frames of a run: images at moments of the video, or a video to continue.

They become latent frames, see `engine.given.known`. Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import ANY_FRAME
from engine.errors import UserError
from engine.files.whole import file_sha256
from engine.paths import expand
from engine.text.timeline import first_frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where a checkpoint sees given frames as conditions without noise: what a plan needs to know of them.

    Attributes:
        first: whether latent frames from the first on are given, whose tokens have timestep 0.
        moments: frames of the video, ascending, of pictures whose tokens stand beside those of the video.
    """

    first: bool = False
    moments: tuple[int, ...] = ()


Shows = Literal["whole", "new"]

MAX_NOISE = 0.3
"""The default of `GivenFrames.max_noise` (docs/given-frames.md, Rules that were compared)."""

_WHERE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>s?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenImage:
    """An image and its place: `first`, `last`, seconds (`2.5s`) or a frame of the video."""

    where: str
    path: Path

    def frame(self, num_frames: int, fps: int) -> float:
        """The frame of the video, fractional for seconds; UserError if it lies beyond the video."""
        if self.where in ("first", "last"):
            return 0.0 if self.where == "first" else num_frames - 1.0
        match = _WHERE.fullmatch(self.where)
        assert match is not None, "parse_given checks it"
        frame = float(match["number"]) * (fps if match["unit"] else 1)
        if frame > num_frames - 1:
            last = f"{(num_frames - 1) / fps:g}s" if match["unit"] else num_frames - 1
            raise UserError(f"--given {self.where}={self.path} is beyond the video, whose last frame is {last}")
        return frame


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenFrames:
    """The frames that a run is given.

    Attributes:
        images: in any order.
        extend: a video, or latents of one, that the new video begins with.
        shows: `whole`, or `new` for a file without the frames of `extend`.
        max_noise: the most noise that they have before a step, see `engine.given.known`.
    """

    images: tuple[GivenImage, ...] = ()
    extend: Path | None = None
    shows: Shows = "whole"
    max_noise: float = MAX_NOISE

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `parse_given` for these frames, in JSON types, with absolute paths."""
        words = [f"{image.where}={image.path.absolute()}" for image in self.images]
        extend = None if self.extend is None else str(self.extend.absolute())
        return {"words": words, "extend": extend, "shows": self.shows}

    def check_files(self) -> None:
        """Raise UserError for a file that cannot be opened, before anything slow is imported to read it."""
        files = [(image.path, f"the picture {image.path}") for image in self.images]
        for path, name in files if self.extend is None else [*files, (self.extend, f"--extend {self.extend}")]:
            try:
                path.open("rb").close()
            except OSError as error:
                raise UserError(f"cannot read {name}: {error.strerror}") from error

    def trained(self, *, num_frames: int, fps: int, pictures: Sequence[str]) -> dict[str, GivenImage]:
        """The images that are conditions of a checkpoint that was trained for `pictures`, by place.

        Places are `first`, `last`, and for a checkpoint that takes any frame the number of each other than the first.
        """
        frames = {round(image.frame(num_frames, fps)): image for image in self.images}
        if ANY_FRAME in pictures:
            return {str(frame) if frame else "first": image for frame, image in frames.items()}
        ends = {num_frames - 1: "last", 0: "first"}
        places = {ends.get(frame, ""): image for frame, image in frames.items()}
        return {place: image for place, image in places.items() if place in pictures}

    def num_beside(self, *, num_frames: int, fps: int, pictures: Sequence[str]) -> int:
        """The number of images whose tokens stand beside those of the video, see `engine.adapters.base.Condition`."""
        return len(self.places(num_frames=num_frames, fps=fps, pictures=pictures).moments)

    def places(self, *, num_frames: int, fps: int, pictures: Sequence[str], needs: Sequence[str] = ()) -> Places:
        """The places of conditions without noise of a checkpoint that was trained for `pictures`, of which it needs some."""
        trained = self.trained(num_frames=num_frames, fps=fps, pictures=pictures)
        beside = [int(place) for place in trained if place != "first"] if ANY_FRAME in pictures else []
        first = "first" in trained or self.continues(pictures)
        return Places(first=first and not needs, moments=tuple(sorted(beside)))

    def continues(self, pictures: Sequence[str]) -> bool:
        """Whether the video to continue is a condition of a checkpoint that was trained for `pictures`."""
        return self.extend is not None and "first" in pictures

    def settings(self, *, num_frames: int, fps: int, step: int, pictures: Sequence[str] = ()) -> dict[str, Any]:
        """The settings for the run's id, in JSON types: latent frames and SHA-256 of the files, what is shown, and the rules."""
        places = [str(self.latent(image, num_frames, fps, step)) for image in self.images]
        if len(set(places)) < len(places):
            places = [f"frame {round(image.frame(num_frames, fps))}" for image in self.images]
        images = {place: file_sha256(image.path) for place, image in zip(places, self.images, strict=True)}
        extend = None if self.extend is None else file_sha256(self.extend)
        settings = {"images": images, "extend": extend, "shows": self.shows, "max_noise": self.max_noise}
        trained = sorted(self.trained(num_frames=num_frames, fps=fps, pictures=pictures))
        trained += ["extend"] if self.continues(pictures) else []
        return settings | ({"trained": trained} if trained else {})

    def latent(self, image: GivenImage, num_frames: int, fps: int, step: int) -> int:
        """The latent frame that an image fills: the one that contains its frame of the video."""
        return -(-round(image.frame(num_frames, fps)) // step)

    def record(
        self, *, num_frames: int, fps: int, step: int, begun: int, pictures: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The entry of the record: each file and the frames [start, stop) of the video that it fills; `begun` is the length of `extend`."""
        images = []
        trained = self.trained(num_frames=num_frames, fps=fps, pictures=pictures).values()
        for image in self.images:
            latent = self.latent(image, num_frames, fps, step)
            span = {"start": first_frame(latent, step), "stop": first_frame(latent + 1, step)}
            if image in trained:  # that frame alone
                frame = round(image.frame(num_frames, fps))
                span = {"start": frame, "stop": frame + 1}
            images.append({"where": image.where, "file": image.path.name, **span})
        extend = None if self.extend is None else {"file": self.extend.name, "start": 0, "stop": begun}
        return {"images": images, "extend": extend, "shows": self.shows}

    def describe(self, *, num_frames: int, fps: int, step: int, pictures: Sequence[str] = ()) -> list[str]:
        """One sentence per image that names the frames of the video that show it, or that it is a condition."""
        notes = []
        trained = self.trained(num_frames=num_frames, fps=fps, pictures=pictures)
        for place, image in trained.items():
            which = f"frame {place}" if place.isdigit() else f"the {place} frame"
            notes.append(f"{image.path.name} is the condition of {which}, which this checkpoint was trained for")
        for image in self.images:
            if image in trained.values():
                continue
            latent = self.latent(image, num_frames, fps, step)
            still = "" if latent == 0 else f", as a still of {step} frames"
            plural = "" if latent == 0 else "s"
            notes.append(f"{image.path.name} is given at frame{plural} {span_of(latent, step)}{still}")
        return notes


def span_of(latent: int, step: int) -> str:
    """The frames of the video in a latent frame, in words."""
    first, last = first_frame(latent, step), first_frame(latent + 1, step) - 1
    return str(first) if first == last else f"{first} to {last}"


def parse_given(words: Sequence[str], extend: str | None, shows: Shows = "whole") -> GivenFrames | None:
    """Parse the values of `--given` (WHERE=FILE each), `--extend` and `--extend_shows`; None if all are unset."""
    images = []
    for word in words:
        where, equals, path = word.partition("=")
        if not equals or not path or (where not in ("first", "last") and not _WHERE.fullmatch(where)):
            raise UserError(
                f"--given {word!r} is not WHERE=FILE; WHERE is first, last, seconds such as 2.5s, or a frame"
            )
        images.append(GivenImage(where=where, path=expand(path)))
    if extend is None and shows == "new":
        raise UserError("--extend_shows new needs --extend")
    if not images and extend is None:
        return None
    return GivenFrames(images=tuple(images), extend=None if extend is None else expand(extend), shows=shows)
