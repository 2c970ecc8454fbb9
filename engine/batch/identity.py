"""Identify videos by content: equal ids mean equal videos, on any machine and in any order.

An id hashes what decides the pixels: checkpoint, number format, size, sampler, method, kernel, decoder, encoder, given frames, prompt
and seed. Ranks, devices, output folders and the order of a batch are left out.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from engine.config import RunConfig
from engine.identity import differing, flat, group_tree, method_tree

CONFIG_DIGITS = 12
ITEM_DIGITS = 16


def config_tree(
    config: RunConfig, *, checkpoint: str, dtype: str, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that decide pixels, with the checkpoint's digest, the resolved dtype and the settings of given frames.

    Prompt, seed and the settings of unused methods are left out, and so is `given` without any.
    """
    tree = dataclasses.asdict(config)
    sampler = group_tree(config.sampler) | {"noise_stride": config.noise_stride}
    del sampler["seed"]
    return {
        "model": {"checkpoint": checkpoint, "dtype": dtype},
        "video": tree["video"],
        "sampler": sampler,
        "method": method_tree(config.method),
        "attention": group_tree(config.attention),
        "decode": tree["decode"],
        "output": {"crf": config.output.crf},
    } | ({} if given is None else {"given": given})


def config_id(tree: Mapping[str, Any]) -> str:
    """Twelve hex digits for a `config_tree`."""
    return text_sha256(canonical(tree))[:CONFIG_DIGITS]


def item_id(config: str, *, prompt: str, seed: int) -> str:
    """Sixteen hex digits for one video: `config` is a `config_id`, which holds the negative prompt."""
    what = {"config": config, "prompt": text_sha256(prompt), "seed": seed}
    return text_sha256(canonical(what))[:ITEM_DIGITS]


def canonical(tree: Any) -> str:
    """The one JSON text of a tree: sorted keys, no spaces; nan and infinity are a ValueError."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences of two trees, as `video.num_frames 129 -> 257`, sorted by key."""
    before, after = flat(old), flat(new)
    return [f"{key} {before.get(key, _NONE)} -> {after.get(key, _NONE)}" for key in differing(before, after)]


_NONE = "(not set)"
