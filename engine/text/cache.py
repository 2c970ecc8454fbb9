"""Text embeddings by the hash of what decides them: a prompt is encoded once, whoever asks for it again."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from engine.adapters.base import Text
from engine.files.locks import locked
from engine.files.whole import atomic_path

Encode = Callable[[list[str]], list[Text]]

# In memory, on the CPU: the prompt and the negative prompt of the videos at hand. The rest is on the disk.
KEPT = 16


def cache_key(*, checkpoint: str, dtype: str, max_text_tokens: int, device: str) -> str:
    """What decides embeddings beside the prompt: checkpoint, number format, length, and where the encoder runs."""
    decides = {"checkpoint": checkpoint, "dtype": dtype, "max_text_tokens": max_text_tokens, "device": device}
    return json.dumps(decides, sort_keys=True)


def cached_name(key: str, prompt: str) -> str:
    """The file of a prompt's embeddings in a cache's folder."""
    return f"{hashlib.sha256(json.dumps([key, prompt]).encode()).hexdigest()}.safetensors"


class TextCache:
    """Embeddings of prompts under the settings `key` (checkpoint, dtype, length, device), in memory and in a folder.

    Reading one back gives the bits that were written. Processes that share a folder wait for the one that encodes a prompt.
    """

    def __init__(self, key: str, folder: Path | None = None) -> None:
        self._key = key
        self._folder = folder
        self._kept: OrderedDict[str, Text] = OrderedDict()

    def texts(self, prompts: Sequence[str], encode: Encode) -> list[Text]:
        """The embeddings of each prompt, on the CPU; `encode` is called for those that are nowhere yet, one by one."""
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
            if (found := _read(path)) is not None:  # another process has just made it
                return found
            text = _on_cpu(encode([prompt])[0])
            tensors = {str(index): part.contiguous() for index, part in enumerate(text)}
            with atomic_path(path) as part:
                part.write_bytes(safetensors.torch.save(tensors))
        return text


def _read(path: Path) -> Text | None:
    """What lies there; None for a file that is missing or broken, which is made anew."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
        return tuple(tensors[str(index)] for index in range(len(tensors))) or None
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _on_cpu(text: Text) -> Text:
    return tuple(part.cpu() for part in text)
