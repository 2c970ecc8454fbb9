"""A comparison: the videos of some variants on the same prompts and seeds, in the folder of a batch.

The folder is that of batch.py (engine/batch/files.py), with a contact sheet and, once they were made, measures of each video.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.batch.files import BatchFiles, ItemFiles
from engine.batch.identity import text_sha256
from engine.batch.items import FILE, Batch, Item, check_folder, claim_folder, plan_batch
from engine.batch.locks import Shard
from engine.batch.store import is_done
from engine.batch.suite import Prompt, Suite
from engine.batch.variants import MAY_DIFFER, Variant
from engine.config import RunConfig
from engine.errors import UserError
from engine.files.checks import check_places
from engine.files.trees import Shape, read_tree
from engine.identity import flat
from engine.shown import Say, say_on_stderr
from engine.text.timeline import parse_timeline

# Fields of a record that a comparison, its kept measures and its report read, and of the sidecar that holds it.
RECORD: Shape = {
    "resumed_at": int,
    "seconds.denoise": int | float,
    "seconds.decode": int | float,
    "steps[].mode": str,
    "steps[].seconds": int | float,
    "steps[].cpu_seconds?": int | float,
    "device.name": str,
    "device.cpu_threads": int,
    "parallel.ranks": int,
    "versions.torch": str,
    "git": dict | None,
    "model": dict,
    "model.commit?": str,
    "model.sha256?{}": str,
    "model.single_file?.name": str,
    "model.single_file?.sha256": str,
    "model.single_file_2?.name": str,
    "model.single_file_2?.sha256": str,
    "timeline?[].text": str,
    "timeline?[].start": int,
    "timeline?[].stop": int,
}
_SIDECAR: Shape = {"output.sha256": str, "video": dict} | {f"run.{name}": kind for name, kind in RECORD.items()}
# Those of a timeline, whose measures need its events.
_TIMED: Shape = {"run.timeline[].text": str, "run.timeline[].start": int, "run.timeline[].stop": int}
CHECKPOINT_DIGITS = 16

Key = tuple[str, int, int]
"""Label, prompt and seed of a video."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of a comparison: an item of its batch, with its files."""

    item: Item
    files: ItemFiles

    @property
    def label(self) -> str:
        """Label of the variant."""
        return self.item.variant

    @property
    def prompt_index(self) -> int:
        """Place of the prompt in the list, from 0."""
        return self.item.prompt.line - 1

    @property
    def prompt(self) -> str:
        """Text of the prompt."""
        return self.item.prompt.text

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self.item.seed

    @property
    def is_done(self) -> bool:
        """Whether the video is complete, by its sidecar, which is written last."""
        return self.check(say=lambda line: None)

    def check(self, say: Say = say_on_stderr) -> bool:
        """Like `is_done`, printing a line if the video or its sidecar is damaged and is made again."""
        return is_done(self.files.sidecar, self.item.item_id, shape=self._shape, say=say)

    @property
    def record(self) -> dict[str, Any] | None:
        """The record of its run, with the SHA-256 of the file; None if there is no sidecar."""
        tree = read_tree(self.files.sidecar, self._shape, what="the sidecar of a video")
        return None if tree is None else record_of(tree)

    @property
    def _shape(self) -> Shape:
        return _SIDECAR if parse_timeline(self.prompt) is None else _SIDECAR | _TIMED

    @property
    def key(self) -> Key:
        """Identity within a comparison."""
        return self.label, self.prompt_index, self.seed


def record_of(sidecar: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run that made an item, with its sidecar's facts about the video."""
    return sidecar["run"] | {"video": dict(sidecar["video"]) | {"sha256": sidecar["output"]["sha256"]}}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a comparison needs to know of its checkpoint; `launch.batching.comparison.model_facts` reads it.

    Attributes:
        digest: SHA-256 of the checkpoint, in hex.
        dtype: number format, such as float32.
        device: kind of the device.
        native_frames: frames of a video of native length.
    """

    digest: str
    dtype: str
    device: str
    native_frames: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Variants to compare, their prompts and seeds, and the folder."""

    folder: Path
    model: ModelFacts
    variants: list[Variant]
    prompts: list[str]
    seeds: list[int]
    kept_file: Path | None = None
    """File of measures that outlive the videos (kept_measures.py)."""
    long_measures: bool = False
    """Whether videos have the measures of a long video's course too (metrics/course.py)."""

    @property
    def is_native(self) -> bool:
        """Whether the videos are no longer than the native length, so that every method runs the base model."""
        return self.config.video.num_frames <= self.model.native_frames

    @property
    def labels(self) -> list[str]:
        """Labels of the variants."""
        return [variant.label for variant in self.variants]

    @property
    def noise(self) -> dict[str, str]:
        """Initial noise by label of the variants."""
        return {variant.label: variant.config.noise[0] for variant in self.variants}

    @property
    def config(self) -> RunConfig:
        """The settings that all variants share; its method is that of the first."""
        return self.variants[0].config

    @property
    def arranged_for(self) -> RunConfig:
        """The settings to arrange ranks for: those of the method with the most refused axes.

        Its layouts also suit the others, unless methods refuse different axes; those share cfg alone.
        """
        return max((each.config for each in self.variants), key=lambda config: len(config.method.method.refused_axes))

    @cached_property
    def batch(self) -> Batch:
        """The items; their ids hash what decides them."""
        prompts = [
            Prompt(prompt_id=f"p{index:04d}", line=index + 1, text=text) for index, text in enumerate(self.prompts)
        ]
        suite = Suite(name="the prompts", sha256=text_sha256("\n".join(self.prompts)), prompts=tuple(prompts))
        return plan_batch(
            self.variants,
            suite,
            seeds=self.seeds,
            checkpoint=self.model.digest,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    @property
    def batch_files(self) -> BatchFiles:
        """The files of the folder."""
        return BatchFiles(root=self.folder)

    @property
    def videos(self) -> list[Video]:
        """Every video, in the order in which they are made, so that a stopped run leaves complete prompts."""
        return [Video(item=item, files=self.batch_files.of(item)) for item in self.batch.items]

    def videos_of(self, shard: Shard) -> list[Video]:
        """The videos of one shard."""
        return [video for video in self.videos if shard.owns(video.item.item_id)]

    def variant(self, label: str) -> Variant:
        """Look up a variant by its label."""
        return next(variant for variant in self.variants if variant.label == label)

    def open(self) -> None:
        """Create the folder and describe its content; UserError if it holds something else."""
        self.check()
        # Finds names that are too long.
        firsts = {video.label: video.files for video in reversed(self.videos)}
        check_places(
            [self.folder / FILE, *(path for files in firsts.values() for path in (files.video, files.snapshot))]
        )
        self.batch_files.check()
        claim_folder(self.folder, self.batch)

    def check(self) -> None:
        """Raise UserError if the folder's videos were made with other settings."""
        for old in ("comparison.json", "analysis.json"):
            if (self.folder / old).exists():
                raise UserError(
                    f"{self.folder / old} is of an older version, which kept its videos elsewhere; choose another --out"
                )
        check_folder(self.folder, self.batch)

    def describe(self) -> dict[str, Any]:
        """Describe the videos for a report: shared settings, those of each variant, and prompts."""
        batch = self.batch
        tree = batch.trees[batch.config_ids[self.variants[0].label]]
        shared = {key: value for key, value in flat(tree).items() if not key.startswith((*MAY_DIFFER, "model."))}
        model = {
            "device": batch.device,
            "dtype": tree["model"]["dtype"],
            "checkpoint": tree["model"]["checkpoint"][:CHECKPOINT_DIGITS],
        }
        variants = {variant.label: variant.settings for variant in self.variants}
        return {"settings": shared | model, "variants": variants, "prompts": self.prompts}
