"""Views: folders of links to finished videos, with names that VBench-Long reads correctly.

VBench-Long cuts file names at the first underscore, takes a final `-<number>` for the sample, scores every file in the
folder, writes its clips there and reuses clips that it finds. So every view is a new folder that holds only links named
`p0007-0.mp4`, and its JSON description lies beside the folder.
"""

import errno
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files.whole import write_json
from evaluation.vbench.dimensions import CONSISTENCY
from evaluation.videos import Video

CLIP_SECONDS = 2
CLIPS = "split_clip"
FIRST_FRAMES = "_cat_firstframes_videos"
SCHEMA = 1

_STEM = re.compile(r"[A-Za-z0-9.-]*[A-Za-z0-9]-\d+")
_MAX_NAME_BYTES = 100
# VBench-Long searches whole paths for these; a folder with one in its name assigns clips to the wrong video.
_IN_PATHS = (CLIPS, "filtered_clips", "temporal_filtered", "-Scene", ".mp4")
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """One video in a view: its stem there (`p0007-0`), and the clips of two seconds that VBench-Long cuts it into."""

    stem: str
    video: Video
    clips: int


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The videos of one method.

    Attributes:
        folder: folder of the links.
        label: the method, or method and configuration.
        fps: frames per second of all of them.
        items: in the order of their stems.
        fingerprint: SHA-256 of stems and contents, which identifies results.
    """

    folder: Path
    label: str
    fps: int
    items: tuple[Staged, ...]
    fingerprint: str

    @property
    def description(self) -> Path:
        """The JSON file beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.json")


def plan_view(label: str, videos: Sequence[Video], root: Path) -> View:
    """Plan the view of one method's videos below `root`; writes nothing.

    The sample number counts the seeds of a prompt from 0. Raises UserError for frame rates that are fractional or differ,
    and for paths that VBench-Long would misread.
    """
    check_place(root)
    fps = common_fps(videos)
    samples: Counter[str] = Counter()
    items = []
    for video in sorted(videos, key=lambda v: (v.prompt_id, v.seed)):
        stem = f"{video.prompt_id}-{samples[video.prompt_id]}"
        samples[video.prompt_id] += 1
        check_stem(stem)
        items.append(Staged(stem=stem, video=video, clips=predict_clips(video.num_frames, fps)))
    stems = Counter(item.stem for item in items)
    if twice := next((stem for stem, count in stems.items() if count > 1), None):
        raise UserError(f"two videos of {label} would both be named {twice}.mp4; prompt ids must tell them apart")
    contents = "".join(f"{item.stem}\t{item.video.sha256}\t{fps}\n" for item in items)
    # Lower case, because VBench-Long cuts paths at "-Scene".
    name = re.sub(r"[^a-z0-9-]", "-", label.lower())[:_MAX_NAME_BYTES]
    return View(
        folder=root / f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:6]}",
        label=label,
        fps=fps,
        items=tuple(items),
        fingerprint=hashlib.sha256(contents.encode()).hexdigest(),
    )


def stage(view: View) -> None:
    """Recreate the view's folder with hard links, or symbolic ones where hard links fail."""
    if view.folder.exists() and not view.description.exists() and any(view.folder.iterdir()):
        raise UserError(f"{view.folder} exists and was not made by this program; move it away")
    view.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(view.description, describe(view))
    remove(view)
    view.folder.mkdir()
    for item in view.items:
        link(item.video.path, view.folder / f"{item.stem}.mp4")
    check(view)


def remove(view: View) -> None:
    """Delete the folder with all that VBench-Long wrote into it; the videos stay."""
    if view.folder.exists():
        shutil.rmtree(view.folder)


def check(view: View, *, split: bool = False) -> None:
    """Raise UserError unless the folder holds exactly the view's videos, and its clips if `split`.

    VBench-Long would silently score foreign videos or a wrong number of clips. First frames of a dimension may exist
    beside clips; see `clear_first_frames`.
    """
    expected = {f"{item.stem}.mp4" for item in view.items} | ({CLIPS} if split else set())
    allowed = expected | ({f"{dimension}{FIRST_FRAMES}" for dimension in CONSISTENCY} if split else set())
    found = {path.name for path in view.folder.iterdir()} if view.folder.is_dir() else set()
    if strange := sorted(found - allowed):
        raise UserError(f"{view.folder} holds {strange[0]}, which does not belong there; it must be staged again")
    if missing := sorted(expected - found):
        raise UserError(f"{view.folder} lacks {missing[0]}; it must be staged again")
    for item in view.items:
        path = view.folder / f"{item.stem}.mp4"
        if not item.video.path.is_file():
            raise UserError(f"{item.video.path} is gone; it must be made again")
        if not path.is_file() or path.stat().st_size != item.video.path.stat().st_size:
            raise UserError(f"{path} is not {item.video.path} any more; it must be staged again")
        if split:
            check_clips(view, item)


def check_clips(view: View, item: Staged) -> None:
    """Raise UserError unless a video was cut into the predicted clips, by name."""
    folder = view.folder / CLIPS / item.stem
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found != clip_names(item.stem, item.clips, item.video.num_frames, view.fps):
        raise UserError(
            f"{item.video.label} has {item.video.num_frames} frames at {view.fps} per second: VBench-Long "
            "should cut it into "
            f"{item.clips} clips of {CLIP_SECONDS} s, and {folder} holds {len(found)}"
        )


def clear_first_frames(view: View, dimension: str) -> None:
    """Delete a dimension's first-frame videos of an earlier run, which VBench-Long would reuse."""
    folder = view.folder / f"{dimension}{FIRST_FRAMES}"
    if folder.exists():
        shutil.rmtree(folder)


def predict_clips(num_frames: int, fps: int) -> int:
    """Return the number of clips that VBench-Long makes: 2 fps frames each; a remainder becomes one more, overlapping clip."""
    length = CLIP_SECONDS * fps
    return max(1, -(-num_frames // length))


def clip_names(stem: str, clips: int, num_frames: int, fps: int) -> list[str]:
    """Return the file names of the clips of one video; a video shorter than a clip is kept whole."""
    if num_frames < CLIP_SECONDS * fps:
        return [f"{stem}_full.mp4"]
    return [f"{stem}_{index:03d}.mp4" for index in range(clips)]


def common_fps(videos: Sequence[Video]) -> int:
    """Return the frame rate of all videos; UserError unless it is one integer, since VBench-Long truncates it."""
    broken = next((video for video in videos if video.fps.denominator != 1), None)
    if broken is not None:
        raise UserError(
            f"{broken.path} has {float(broken.fps):.3f} frames per second; VBench-Long reads whole rates only"
        )
    first = videos[0]
    other = next((video for video in videos if video.fps != first.fps), None)
    if other is not None:
        raise UserError(
            f"{first.path} has {first.fps} frames per second and {other.path} has {other.fps}; clips must be "
            "equally long"
        )
    return int(first.fps)


def check_stem(stem: str) -> None:
    """Raise UserError for a name that VBench-Long would misread."""
    if "_" in stem:
        raise UserError(f"{stem!r} has an underscore, where VBench-Long cuts names off")
    if not _STEM.fullmatch(stem) or "-Scene" in stem or ".mp4" in stem or len(f"{stem}.mp4") > _MAX_NAME_BYTES:
        raise UserError(
            f"{stem[:60]!r} is no name for VBench-Long: it must be letters, digits, dots and dashes, end in "
            "-NUMBER, be at "
            f"most {_MAX_NAME_BYTES} bytes with its ending, and hold neither '-Scene' nor '.mp4'"
        )


def check_place(root: Path) -> None:
    """Raise UserError if a folder's own path would confuse VBench-Long."""
    found = next((part for part in _IN_PATHS if part in str(root.absolute())), None)
    if found is not None:
        raise UserError(
            f"{root.absolute()} has {found!r} in it, which VBench-Long searches paths for; choose another --out"
        )


def link(source: Path, place: Path) -> None:
    """Make a hard link, which keeps the file even if its name is reused, or a symbolic one where that fails."""
    try:
        place.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        place.symlink_to(source)


def describe(view: View) -> dict[str, Any]:
    """Describe a view for the JSON file beside it and for its results."""
    return {
        "schema": SCHEMA,
        "label": view.label,
        "fps": view.fps,
        "fingerprint": view.fingerprint,
        "items": [
            {
                "stem": item.stem,
                "prompt_id": item.video.prompt_id,
                "seed": item.video.seed,
                "sha256": item.video.sha256,
                "num_frames": item.video.num_frames,
                "clips": item.clips,
                "source": str(item.video.path),
            }
            for item in view.items
        ],
    }
