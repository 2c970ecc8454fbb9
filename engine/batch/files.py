"""The files of a batch in its output folder."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.batch.items import FILE, Item
from engine.batch.locks import Shard
from engine.batch.store import Manifest, Verify, compile_manifest, is_done
from engine.errors import UserError
from engine.files.locks import locked
from engine.files.tensors import FORMER_ENDING
from engine.files.trees import Shape, check_tree, read_json, read_kept
from engine.files.whole import sweep, write_json, write_text

MANIFEST = "manifest.jsonl"

QUARANTINED: Shape = {"item_id": str, "method": str, "status": str, "error": str}
SIDECAR: Shape = {
    "item_id": str,
    "config_id": str,
    "method": str,
    "prompt_id": str,
    "prompt": str,
    "seed": int,
    "status": str,
    "output.file": str,
    "output.bytes": int,
    "output.sha256": str,
    "latents.sha256": str,
    "video.num_frames": int,
    "video.fps": int | float,
    "video.height": int,
    "video.width": int,
}

# Keys of a sidecar that are copied to the manifest: enough to find, judge and pair videos without opening each.
_ROW = (
    "item_id",
    "config_id",
    "method",
    "prompt_id",
    "source",
    "line",
    "prompt",
    "prompt_en",
    "prompt_sha256",
    "negative_prompt",
    "seed",
    "suite",
)


@dataclass(frozen=True, kw_only=True)
class ItemFiles:
    """The files of one item, in `VARIANT/CONFIG_ID/` of the output folder.

    Attributes:
        folder: that folder.
        name: stem of the files.
    """

    folder: Path
    name: str

    @property
    def video(self) -> Path:
        """The mp4."""
        return self.folder / "videos" / f"{self.name}.mp4"

    @property
    def sidecar(self) -> Path:
        """The JSON file that is written last."""
        return self.folder / "videos" / f"{self.name}.json"

    @property
    def sheet(self) -> Path:
        """Contact sheet, where one is written."""
        return self.video.with_suffix(".png")

    @property
    def measures(self) -> Path:
        """Measures of the video, once they were made."""
        return self.folder / "measures" / f"{self.name}.json"

    @property
    def latents(self) -> Path:
        """Latents, if they are kept."""
        return self.folder / "latents" / f"{self.name}.safetensors"

    @property
    def snapshot(self) -> Path:
        """Snapshot of an item that is being denoised."""
        return self.folder / "unfinished" / f"{self.name}.snapshot.safetensors"

    @property
    def preview(self) -> Path:
        """Preview of an item that is being denoised, where one is made."""
        return self.folder / "unfinished" / f"{self.name}.preview.webp"

    def part(self, token: str) -> Path:
        """Temporary file of one attempt, named by its unique token."""
        return self.video.with_name(f"{self.video.name}.{token}.part")

    def make_folders(self) -> None:
        """Create their folders."""
        for path in (self.video, self.snapshot):
            path.parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, kw_only=True)
class BatchFiles:
    """The output folder of a batch."""

    root: Path

    def of(self, item: Item) -> ItemFiles:
        """The files of an item."""
        return item_files(self.root, item.variant, item.config_id, item.name)

    @property
    def text_cache(self) -> Path:
        """Folder of text embeddings."""
        return self.root / "text"

    @property
    def quarantine(self) -> Path:
        """Folder of items that failed for good."""
        return self.root / "quarantine"

    def status(self, shard: Shard) -> Path:
        """The file that `--status` reads."""
        return self.root / "status" / f"{shard.name}.json"

    def log(self, shard: Shard) -> Path:
        """Log of all events, JSON lines."""
        return self.root / "logs" / f"{shard.name}.jsonl"

    def rank_log(self, shard: Shard, replica: str, rank: int) -> Path:
        """Stderr of a rank."""
        return self.root / "logs" / shard.name / f"{replica}-rank{rank}.log"

    def is_done(self, item: Item, verify: Verify) -> bool:
        """Whether the item's video is complete; UserError if its file name is taken by another video."""
        return is_done(self.of(item).sidecar, item.item_id, verify=verify, shape=SIDECAR)

    def tidy(self, *, done: Iterable[Item], todo: Iterable[Item]) -> None:
        """Delete leftovers of killed processes of these items, except snapshots of those in `todo`.

        Those of older versions get their present name.
        """
        done, todo = list(done), list(todo)
        folders = {(variant_folder(item.variant), item.config_id, item.name) for item in (*done, *todo)}
        # One pass over the folder instead of one for each of thousands of items.
        for former in self.root.glob(f"*/*/unfinished/*{FORMER_ENDING}"):
            files = ItemFiles(folder=former.parents[1], name=former.name.removesuffix(FORMER_ENDING))
            if (*former.parts[-4:-2], files.name) in folders:
                former.unlink() if files.snapshot.exists() else former.rename(files.snapshot)
        for item in done:
            self.of(item).snapshot.unlink(missing_ok=True)
            self.of(item).preview.unlink(missing_ok=True)
        for part in self.root.glob("*/*/*/*.part"):
            folder, config = part.parts[-4:-2]
            if (folder, config, part.name.partition(".")[0]) in folders:
                part.unlink(missing_ok=True)
        sweep(self.text_cache)

    def drop_parts(self, item: Item) -> None:
        """Delete temporary files of killed attempts of an item of which no attempt runs."""
        files = self.of(item)
        for folder in (files.video.parent, files.snapshot.parent):
            for part in folder.glob(f"{item.name}.*.part"):
                part.unlink(missing_ok=True)

    def quarantined(self, item: Item) -> dict[str, Any] | None:
        """Read why an item was given up; None if it was not, or if the file is damaged, so that the item is retried."""
        return read_kept(self._quarantine_file(item, "json"), QUARANTINED, what="an item in quarantine")

    def put_into_quarantine(self, item: Item, *, error: str, attempts: list[dict[str, Any]]) -> Path:
        """Record an item that failed for good; returns the file with the tracebacks of all attempts."""
        self.quarantine.mkdir(parents=True, exist_ok=True)
        text = self._quarantine_file(item, "txt")
        blocks = [f"attempt {a['attempt']}: {a['kind']}: {a['message']}\n\n{a['traceback']}\n" for a in attempts]
        write_text(text, f"{item.label} ({item.item_id})\n{item.prompt.text}\n\n" + "\n".join(blocks))
        summary = [{key: a[key] for key in ("attempt", "kind", "message", "replica")} for a in attempts]
        record = {**identity_of(item), "status": "quarantined", "error": error, "attempts": summary}
        write_json(self._quarantine_file(item, "json"), record | {"traceback": text.name})
        return text

    def release(self, item: Item) -> None:
        """Take an item out of quarantine."""
        for kind in ("json", "txt"):
            self._quarantine_file(item, kind).unlink(missing_ok=True)

    def drop_snapshot(self, item: Item) -> bool:
        """Delete the item's snapshot, which may cause its failure; returns whether there was one."""
        snapshot = self.of(item).snapshot
        exists = snapshot.exists()
        snapshot.unlink(missing_ok=True)
        return exists

    def sidecars(self) -> Iterator[Path]:
        """Every sidecar in the folder, of all shards."""
        return self.root.glob("*/*/videos/*.json")

    def lacks_latents(self, item: Item) -> bool:
        """Whether a finished item was made without keeping its latents."""
        return not self.of(item).latents.is_file()

    def check(self) -> None:
        """Raise UserError if a foreign file or folder has the name of one that a batch writes."""
        try:
            nearest = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
            if not nearest.is_dir():
                raise UserError(f"cannot write to the folder {self.root}: {nearest} is not a folder")
            for path in (self.root / name for name in ("text", "quarantine", "logs", "status", "locks")):
                if path.exists() and not path.is_dir():
                    raise UserError(f"{path} is not a folder, where a batch has one; move it away")
            for path in (self.root / MANIFEST, self.root / FILE):
                if path.is_dir():
                    raise UserError(f"{path} is a folder, where a batch has a file; move it away")
        except OSError as error:
            raise UserError(f"cannot look into the folder {self.root}: {error.strerror}") from error

    def write_manifest(self) -> Manifest:
        """Compile `manifest.jsonl` from all sidecars and quarantined items."""
        (self.root / "locks").mkdir(exist_ok=True)
        with locked(self.root / "locks" / "manifest.lock"):
            every = [*self.sidecars(), *self.quarantine.glob("*.json")]
            return compile_manifest(self.root / MANIFEST, every, manifest_row)

    def _quarantine_file(self, item: Item, kind: str) -> Path:
        return self.quarantine / f"{variant_folder(item.variant)}-{item.name}-{item.item_id}.{kind}"


def item_files(root: Path, variant: str, config: str, name: str) -> ItemFiles:
    """Return the files of an item from the parts of its folder and stem."""
    return ItemFiles(folder=root / variant_folder(variant) / config, name=name)


def variant_folder(label: str) -> str:
    """The folder of a variant: its label, without the colon of a class by import path, `package.module:Class`."""
    return re.sub(r"[^\w.+-]", "-", label)


def variant_of(tree: Mapping[str, Any]) -> str:
    """Label of the variant that a sidecar names; those of older versions name its method alone."""
    return str(tree.get("variant", tree["method"]))


def identity_of(item: Item) -> dict[str, Any]:
    """The part of a sidecar that is known before the video is made."""
    return {
        "item_id": item.item_id,
        "config_id": item.config_id,
        "variant": item.variant,
        "method": item.method,
        "prompt_id": item.prompt.prompt_id,
        **{key: value for key in ("source", "prompt_en") if (value := getattr(item.prompt, key)) is not None},
        "line": item.prompt.line,
        "prompt": item.prompt.text,
        "prompt_sha256": item.prompt.sha256,
        "seed": item.seed,
    }


def manifest_row(path: Path) -> dict[str, Any]:
    """Convert a sidecar, or an item in quarantine, to a row of the manifest; UserError for other files."""
    tree = read_json(path)
    if isinstance(tree, Mapping) and tree.get("status") == "quarantined":
        check_tree(path, tree, QUARANTINED, what="an item in quarantine")
    else:
        check_tree(path, tree, SIDECAR, what="the sidecar of a video")
    row = {key: tree[key] for key in _ROW if key in tree}
    row |= {"variant": variant_of(tree), "status": tree["status"]}
    if tree["status"] != "done":
        return row | {"error": tree["error"]}
    folder = f"{variant_folder(variant_of(tree))}/{tree['config_id']}/videos"
    return row | {
        "path": f"{folder}/{tree['output']['file']}",
        "bytes": tree["output"]["bytes"],
        "sha256": tree["output"]["sha256"],
        "latents_sha256": tree["latents"]["sha256"],
        "num_frames": tree["video"]["num_frames"],
        "fps": tree["video"]["fps"],
        "height": tree["video"]["height"],
        "width": tree["video"]["width"],
    }
