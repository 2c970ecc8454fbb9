"""A cache of text embeddings, keyed by prompt and settings, so that every prompt is encoded once."""

import contextlib
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch

from engine.adapters.base import Text
from engine.files.locks import locked
from engine.files.tensors import DAMAGED
from engine.files.whole import atomic_path

Encode = Callable[[list[str]], list[Text]]

# Embeddings in memory, on the CPU, for the prompts of current videos; the rest is on the disk.
KEPT = 16


def cache_key(*, checkpoint: str, dtype: str, max_text_tokens: int, device: str) -> str:
    """The settings that affect embeddings: checkpoint, dtype, length, and the encoder's device."""
    decides = {"checkpoint": checkpoint, "dtype": dtype, "max_text_tokens": max_text_tokens, "device": device}
    return json.dumps(decides, sort_keys=True)


def cached_name(key: str, prompt: str) -> str:
    """The file of a prompt's embeddings in a cache's folder."""
    return f"{hashlib.sha256(json.dumps([key, prompt]).encode()).hexdigest()}.safetensors"


def trim(folder: Path, most: int) -> None:
    """Delete the embeddings in a cache's folder that were written longest ago, down to `most`; a missing one is made again."""
    written = {}
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            written[path] = path.stat().st_mtime_ns
    for path in sorted(written, key=lambda path: written[path])[: max(len(written) - most, 0)]:
        path.unlink(missing_ok=True)


class TextCache:
    """Embeddings of prompts under the settings `key` (checkpoint, dtype, length, device), in memory and in a folder.

    Embeddings are read back bit for bit. Processes that share a folder wait for the one that encodes a prompt.
    """

    def __init__(self, key: str, folder: Path | None = None) -> None:
        self._key = key
        self._folder = folder
        self._kept: OrderedDict[str, Text] = OrderedDict()

    def texts(self, prompts: Sequence[str], encode: Encode) -> list[Text]:
        """Return the embeddings of each prompt, on the CPU; `encode` is called for missing ones, one by one."""
        return [self._text(prompt, encode) for prompt in prompts]

    def _text(self, prompt: str, encode: Encode) -> Text:
        name = cached_name(self._key, prompt)
        if name not in self._kept:
            self._kept[name] = self._from_folder(name, prompt, encode)
        self._kept.move_to_end(name)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[name]

    def _from_folder(self, name: str, prompt: str, encode: Encode) -> Text:
        if self._folder is None:
            return _on_cpu(encode([prompt])[0])
        path = self._folder / name
        if (found := _read(path)) is not None:
            return found
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked(self._folder / f"{name}.lock"):
            if (found := _read(path)) is not None:  # another process has written it meanwhile
                return found
            text = _on_cpu(encode([prompt])[0])
            tensors = {str(index): part.contiguous() for index, part in enumerate(text)}
            with atomic_path(path) as part:
                part.write_bytes(safetensors.torch.save(tensors))
        return text


def _read(path: Path) -> Text | None:
    """Read embeddings; None for a missing or broken file."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        return tuple(tensors[str(index)] for index in range(len(tensors))) or None
    except (FileNotFoundError, *DAMAGED):
        return None


def _on_cpu(text: Text) -> Text:
    return tuple(part.cpu() for part in text)
