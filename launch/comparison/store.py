"""The folder of a comparison: which videos it shall hold, which are there, and that all were made alike.

    OUT/comparison.json                        what decides the videos: settings, checkpoint, variants, prompts
    OUT/videos/LABEL/PPP-seedS.mp4             video of prompt PPP (000, 001, ..) with seed S, beside its record
                                               (.json), contact sheet (.png), and measures (.metrics.json)

    OUT/locks/                                 who is at work: one process, or one for each shard

A video counts as there once its record is, which is written last.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batch.identity import flat
from engine.batch.locks import Shard
from engine.batch.variants import MAY_DIFFER, Variant
from engine.config import RunConfig
from engine.devices import pick_device, pick_dtype
from engine.errors import UserError
from engine.files.checks import check_places
from engine.files.locks import locked
from engine.files.say import Say, say_on_stderr
from engine.files.trees import DamagedError, Shape, lacking, parse_json, read_kept, read_tree
from engine.files.whole import atomic_path
from engine.load.checkpoint import open_checkpoint
from launch.outputs import OutputFiles, latents_beside

# Settings that do not decide what a video shows: any number of ranks makes the same one. Methods, noise and seeds are
# kept per variant and per file.
_NOT_SHARED = (*MAY_DIFFER, "parallel.", "output.", "sampler.seed", "model.path", "model.device", "model.dtype")
_SHOWN_KEYS = 6

# What a comparison reads of a record.
RECORD: Shape = {"video.sha256": str, "resumed_at": int, "seconds": dict, "steps": list}

Key = tuple[str, int, int]
"""Label, prompt and seed of a video."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video of a comparison."""

    label: str
    prompt_index: int
    prompt: str
    seed: int
    files: OutputFiles

    @property
    def is_done(self) -> bool:
        """Whether the video is whole, by its record, which is written last."""
        return self.files.video.is_file() and self.record is not None

    @property
    def record(self) -> dict[str, Any] | None:
        """Its record; None if there is none, or it is damaged."""
        try:
            return read_tree(self.files.record, RECORD, what="the record of a video")
        except DamagedError:
            return None

    def check(self, say: Say = say_on_stderr) -> bool:
        """`is_done`, and a line for a record that is damaged, with which the video is made again."""
        record = read_kept(self.files.record, RECORD, what="the record of a video", say=say)
        return record is not None and self.files.video.is_file()

    @property
    def measures(self) -> Path:
        """Its measures, once they were made."""
        return self.files.video.with_suffix(".metrics.json")

    @property
    def key(self) -> Key:
        """What tells it from the other videos of a comparison."""
        return self.label, self.prompt_index, self.seed


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, on which prompts and seeds, and where it is kept."""

    folder: Path
    variants: list[Variant]
    prompts: list[str]
    seeds: list[int]
    kept_file: Path | None = None
    """Where the measures are kept when the videos are gone (kept_measures.py)."""

    @property
    def config(self) -> RunConfig:
        """The settings that all variants share; its method is that of the first."""
        return self.variants[0].config

    @property
    def arranged_for(self) -> RunConfig:
        """The settings that ranks are arranged for: those of the method that the fewest layouts serve.

        A layout of its serves the others, but for methods that refuse different axes, which share cfg alone.
        """
        return max((each.config for each in self.variants), key=lambda config: len(config.method.method.refused_axes))

    @property
    def videos(self) -> list[Video]:
        """Every video, seed after seed and method after method for each prompt.

        A run that is stopped leaves whole comparisons, of as many prompts as may be: prompts are what is independent.
        """
        return [
            Video(
                label=variant.label,
                prompt_index=index,
                prompt=prompt,
                seed=seed,
                files=self._files(variant, index, seed),
            )
            for seed in self.seeds
            for index, prompt in enumerate(self.prompts)
            for variant in self.variants
        ]

    def videos_of(self, shard: Shard) -> list[Video]:
        """The videos of one of several processes that share the work: every n-th pair of prompt and seed, all methods of it."""
        num_methods = len(self.variants)
        return [video for place, video in enumerate(self.videos) if shard.holds(place // num_methods)]

    def variant(self, label: str) -> Variant:
        """The variant called so."""
        return next(variant for variant in self.variants if variant.label == label)

    def open(self) -> None:
        """Make the folder and write what decides its videos; UserError if it holds videos of other settings."""
        open_folder(self.folder, "comparison.json", self.describe())
        # A name that is too long is found now.
        firsts = {video.label: video.files for video in reversed(self.videos)}
        check_places([path for files in firsts.values() for path in files.all])

    def check(self) -> None:
        """Raise UserError if the folder's videos were made with other settings than these, which a report would tell of."""
        before = read_manifest(self.folder / "comparison.json")
        if before is not None:
            refuse_changes(self.folder, before, self.describe())

    def describe(self) -> dict[str, Any]:
        """What decides the videos: shared settings and those of each variant by dotted name, checkpoint and prompts."""
        variants = {variant.label: variant.settings for variant in self.variants}
        return as_read({"settings": decisive_settings(self.config), "variants": variants, "prompts": self.prompts})

    def _files(self, variant: Variant, index: int, seed: int) -> OutputFiles:
        video = self.folder / "videos" / variant.label / f"{index:03d}-seed{seed}.mp4"
        return OutputFiles(video=video, latents=latents_beside(video))


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """What decides a video but for method, noise, prompt and seed, by dotted name; the checkpoint as a hash."""
    tree = flat(dataclasses.asdict(config))
    shared = {key: value for key, value in tree.items() if not key.startswith(_NOT_SHARED)}
    device = pick_device(config.model.device)
    return shared | {
        "output.crf": config.output.crf,
        "device": device.type,
        "dtype": str(pick_dtype(config.model.dtype, device)).removeprefix("torch."),
        "checkpoint": open_checkpoint(config.model).digest[:16],
    }


def as_read(tree: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(tree))


def open_folder(folder: Path, name: str, now: dict[str, Any]) -> None:
    """Make a folder and write there what decides its contents; UserError if it was made with other settings.

    `now` holds settings, variants and prompts. A folder may be widened: variants and prompts that were there before,
    and are not asked for now, stay known.
    """
    manifest = folder / name
    check_places([manifest])
    (folder / "locks").mkdir(exist_ok=True)
    with locked(folder / "locks" / "manifest.lock"):  # shards that start together would each widen what they read
        before = read_manifest(manifest)
        if before is not None:
            refuse_changes(folder, before, now)
            now = widen(before, now)
        with atomic_path(manifest) as part:
            part.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a folder's videos were made with; None for a new folder, UserError for a foreign file."""
    if not path.exists():
        return None
    remedy = "choose another --out"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    manifest = parse_json(data, str(path), remedy=remedy)
    wrong = lacking(manifest, {"settings": dict, "variants": dict, "prompts": list})
    if wrong is None and not all(isinstance(settings, dict) for settings in manifest["variants"].values()):
        wrong = "its variants have no settings"
    if wrong is not None:
        raise UserError(f"{path} was not written by compare.py or analyze.py ({wrong}); {remedy}")
    return manifest


def widen(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What decides the videos of both; variants keep their order, new ones last."""
    prompts = max(before["prompts"], now["prompts"], key=len)
    return now | {"variants": before["variants"] | now["variants"], "prompts": prompts}


def refuse_changes(place: Path, before: dict[str, Any], now: dict[str, Any], *, flag: str = "--out") -> None:
    """Raise UserError, naming what differs, if videos of both would not be comparable; `flag` names the place."""
    changes = _changes(before["settings"], now["settings"], "")
    for label in before["variants"].keys() & now["variants"].keys():
        changes += _changes(before["variants"][label], now["variants"][label], f"{label}: ")
    for index, (old, new) in enumerate(zip(before["prompts"], now["prompts"], strict=False)):
        changes += _changes({f"prompt {index}": old}, {f"prompt {index}": new}, "")
    if changes:
        more = f" and {len(changes) - _SHOWN_KEYS} more" if len(changes) > _SHOWN_KEYS else ""
        raise UserError(
            f"{place} holds videos made with other settings: {'; '.join(changes[:_SHOWN_KEYS])}{more}; choose another "
            f"{flag}, or give the same settings"
        )


def _changes(before: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    names: Sequence[str] = sorted(before.keys() | now.keys())
    return [
        f"{where}{name} was {before.get(name, 'unset')}, now {now.get(name, 'unset')}"
        for name in names
        if before.get(name) != now.get(name)
    ]
