"""Read the videos to evaluate: from a batch's folder, by their sidecars, or from a list."""

import contextlib
import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from engine.batch.files import variant_of
from engine.batch.items import requested_items
from engine.batch.store import beside
from engine.errors import UserError
from engine.files.trees import DamagedError, Shape, check_tree, read_json
from engine.files.whole import file_sha256
from engine.media.read_video import check_colours, open_file
from engine.paths import expand
from engine.shown import Say, say_on_stderr
from evaluation.events import ranges_of
from metrics.events import TextRange

_COLUMNS = ("method", "prompt", "seed", "path")
_SIDECAR: Shape = {
    "method": str,
    "config_id": str,
    "prompt_id": str,
    "prompt": str,
    "seed": int,
    "output.file": str,
    "output.sha256": str,
}
_TIMED: Shape = {"run.timeline[].text": str, "run.timeline[].start": int, "run.timeline[].stop": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One finished video.

    Attributes:
        method: label of its method or variant.
        config_id: hash of the configuration; for videos of a list, of the method's name.
        prompt_id: short name of the prompt, unique within the evaluation.
        prompt: its text.
        seed: of the noise; equal (prompt, seed) of two methods are a pair.
        path: absolute path of the mp4.
        sha256: of the file.
        num_frames: frames in the file.
        fps: frames per second, as the file says.
        model: the model's name or path, where the sidecar says it.
        size: (height, width) in pixels.
        native_frames: frames that the model was trained on, where the sidecar says it.
        settings: (name, value) of the settings of a method that has some, where the sidecar says it.
        events: events of a timeline, where the sidecar lists them.
    """

    method: str
    config_id: str
    prompt_id: str
    prompt: str
    seed: int
    path: Path
    sha256: str
    num_frames: int
    fps: Fraction
    model: str | None
    size: tuple[int, int]
    native_frames: int | None = None
    settings: tuple[tuple[str, Any], ...] = field(default=(), hash=False)  # a sidecar's values may be lists
    events: tuple[TextRange, ...] = ()

    @property
    def pair(self) -> tuple[str, int]:
        """(prompt, seed): videos with equal pairs share noise and text."""
        return self.prompt, self.seed

    @property
    def label(self) -> str:
        """For messages: `freespec/p0007-s3`."""
        return f"{self.method}/{self.prompt_id}-s{self.seed}"


def read_batches(roots: Sequence[Path], say: Say = say_on_stderr) -> list[Video]:
    """Read the finished videos of several folders, such as the rows of an ablation; see `read_batch`."""
    return check_videos([video for root in roots for video in read_batch(root, say)], "there is no folder to read")


def read_batch(root: Path, say: Say = say_on_stderr) -> list[Video]:
    """Read the finished videos of a batch's folder, by method, prompt and seed, and check their hashes.

    Videos with a damaged sidecar, or a missing or changed file, are left out with a line to `say`.

    Raises:
        UserError: the folder has no finished video.
    """
    try:
        is_dir = root.is_dir()
    except OSError as error:
        raise UserError(f"cannot look into --runs {root}: {error.strerror}") from error
    if not is_dir:
        raise UserError(f"--runs {root} is not a folder; give the --out of launch/batch.py")
    videos = []
    for sidecar in sorted(root.glob("*/*/videos/*.json")):
        try:
            tree = _sidecar(sidecar)
            if tree["status"] == "done":
                videos.append(_from_sidecar(sidecar, tree))
        except DamagedError as error:
            say(f"{error.reason}; it is left out, and the command that made the batch makes it again")
    return check_videos(
        videos, f"--runs {root} has no finished video; launch/batch.py --status {root} says what is there"
    )


def what_is_missing(root: Path, videos: Iterable[Video]) -> str | None:
    """Describe the items of a batch's folder that have no video, in all and by method; None if all have one."""
    asked = requested_items(root)
    if asked is None:
        given_up = len(list((root / "quarantine").glob("*.json")))
        return f"{root}: {given_up} items failed for good" if given_up else None
    made = {video.label for video in videos if video.path.is_relative_to(root.absolute())}
    given_up = _quarantined(root) & (asked.keys() - made)
    missing = asked.keys() - made
    if not missing:
        return None
    total, absent = (Counter(label.rpartition("/")[0] for label in labels) for labels in (asked, missing))
    methods = ", ".join(f"{method} {count - absent[method]} of {count}" for method, count in sorted(total.items()))
    return (
        f"{root}: {len(asked) - len(missing)} of {len(asked)} items are made ({methods}), {len(given_up)} failed for good, "
        f"{len(missing) - len(given_up)} are not made yet"
    )


def _quarantined(root: Path) -> set[str]:
    """Labels of the items in quarantine; one with a damaged note is tried again, and counts as not made yet."""
    labels = set()
    for path in (root / "quarantine").glob("*.json"):
        with contextlib.suppress(DamagedError):
            labels.add(_label(_sidecar(path)))
    return labels


def _label(tree: Mapping[str, Any]) -> str:
    return f"{tree.get('variant', tree.get('method'))}/{tree.get('prompt_id')}-s{tree.get('seed')}"


def read_list(path: Path) -> list[Video]:
    """Read the videos of a CSV file with the columns method, prompt, seed and path (relative to the file, or absolute)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read --videos {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--videos {path} is not CSV in UTF-8 ({error})") from error
    numbers: dict[str, int] = {}
    videos = [_from_row(path, line, row, numbers) for line, row in enumerate(rows, start=2)]
    return check_videos(videos, f"--videos {path} has no row; its columns are {','.join(_COLUMNS)}")


def check_videos(videos: list[Video], none: str) -> list[Video]:
    """Sort the videos; UserError if there are none (the message `none`), or two have the same identity."""
    if not videos:
        raise UserError(none)
    seen: dict[tuple[str, str, str, int], Path] = {}
    for video in videos:
        key = (video.method, video.config_id, *video.pair)
        if key in seen:
            raise UserError(f"{seen[key]} and {video.path} have the same method, prompt and seed; keep one of them")
        seen[key] = video.path
    return sorted(videos, key=lambda v: (v.method, v.config_id, v.prompt_id, v.seed))


def groups(videos: Iterable[Video]) -> dict[str, list[Video]]:
    """Group videos by method, or by `method@config_id` where a method has several configurations."""
    videos = list(videos)
    configs: dict[str, set[str]] = {}
    for video in videos:
        configs.setdefault(video.method, set()).add(video.config_id)
    found: dict[str, list[Video]] = {}
    for video in videos:
        alone = len(configs[video.method]) == 1
        found.setdefault(video.method if alone else f"{video.method}@{video.config_id}", []).append(video)
    return found


def _sidecar(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    check_tree(path, tree, {"status": str}, what="a sidecar of launch/batch.py")
    return tree


def _from_sidecar(sidecar: Path, tree: Mapping[str, Any]) -> Video:
    shape = _SIDECAR | {key: dict for key in ("video", "run") if tree.get(key) is not None}
    check_tree(sidecar, tree, shape, what="a sidecar of launch/batch.py")
    timeline = (tree.get("run") or {}).get("timeline")
    if timeline is not None:
        check_tree(sidecar, tree, _TIMED, what="a sidecar of launch/batch.py")
    identity = {key: tree[key] for key in ("config_id", "prompt_id", "prompt", "seed")}
    path = beside(sidecar, tree["output"]["file"]).absolute()
    if not path.is_file():
        raise DamagedError(f"{path}, which its sidecar describes, does not exist")
    digest = file_sha256(path)
    if digest != tree["output"]["sha256"]:
        raise DamagedError(f"{path} is not the file that its sidecar describes")
    facts = _probe(path, digest)
    return Video(
        method=variant_of(tree),
        **identity,
        path=path,
        model=_config(tree, "model").get("path"),
        native_frames=(tree.get("video") or {}).get("native_frames"),
        settings=_settings(tree, tree["method"]),
        events=tuple(ranges_of(timeline or [])),
        **facts,
    )


def _from_row(source: Path, line: int, row: Mapping[str, Any], numbers: dict[str, int]) -> Video:
    missing = [column for column in _COLUMNS if not (row.get(column) or "").strip()]
    if missing:
        raise UserError(f"--videos {source}, line {line}: {missing[0]} is missing; columns are {','.join(_COLUMNS)}")
    method, prompt, seed = (row[column].strip() for column in _COLUMNS[:3])
    if not re.fullmatch(r"-?[0-9]{1,18}", seed):
        raise UserError(f"--videos {source}, line {line}: seed must be a whole number, got {seed!r}")
    try:
        path = expand(row["path"].strip())
    except UserError as error:
        raise UserError(f"--videos {source}, line {line}: {error}") from error
    path = (path if path.is_absolute() else source.parent / path).absolute()
    number = numbers.setdefault(prompt, len(numbers))
    return Video(
        method=method,
        config_id=hashlib.sha256(method.encode()).hexdigest()[:12],
        prompt_id=f"p{number:04d}",
        prompt=prompt,
        seed=int(seed),
        path=path,
        model=None,
        **_probe(path),
    )


def _config(tree: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """Return one group of settings from a sidecar; empty if it lacks them."""
    config = (tree.get("run") or {}).get("config")
    found = config.get(group) if isinstance(config, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _settings(tree: Mapping[str, Any], method: str) -> tuple[tuple[str, Any], ...]:
    """Return the settings of the method that made the video, without those of other methods."""
    found = _config(tree, "method").get(method)
    if not isinstance(found, Mapping):
        return ()
    return tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in found.items()))


def _probe(path: Path, digest: str | None = None) -> dict[str, Any]:
    """Read size, rate and number of frames from the file; `digest` is its SHA-256, if known."""
    try:
        check_colours(path)
        with open_file(path) as container:
            stream = container.streams.video[0]
            size, fps = (stream.height, stream.width), stream.average_rate
            num_frames = sum(1 for packet in container.demux(stream) if packet.size)
        digest = digest or file_sha256(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(f"{path} is not a video that can be read") from error
    if not fps or not num_frames:
        raise UserError(f"{path} has {num_frames} frames at {fps} frames per second")
    return {"sha256": digest, "num_frames": num_frames, "fps": Fraction(fps), "size": size}


def as_json(video: Video) -> dict[str, Any]:
    """The facts of a video for reports."""
    names = ("method", "config_id", "prompt_id", "prompt", "seed", "path", "sha256", "num_frames")
    return {name: getattr(video, name) for name in names} | {"path": str(video.path), "fps": float(video.fps)}
