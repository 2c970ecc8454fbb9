"""The items of a batch, prompts x seeds x variants, and the description of its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.batch.identity import changes, config_id, config_tree, item_id
from engine.batch.suite import Prompt, Suite, check_once
from engine.batch.variants import Variant, check_variants
from engine.errors import UserError
from engine.files.locks import locked
from engine.files.trees import DamagedError, Shape, check_tree, lacking, read_tree
from engine.files.whole import write_json

SCHEMA = 1
FILE = "batch.json"
SHAPE: Shape = {"configs": dict, "prompts": dict}
NOTHING: Mapping[str, Any] = {"schema": SCHEMA, "configs": {}, "prompts": {}}
"""The description of a folder that holds nothing yet."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video of a batch.

    Attributes:
        item_id: hash of what decides its pixels; see `engine.batch.identity`.
        config_id: hash of its configuration alone.
        variant: label of the method with its settings.
        method: name of the method.
        prompt: prompt, with its name.
        seed: seed of the noise, which is the same for every variant.
    """

    item_id: str
    config_id: str
    variant: str
    method: str
    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """Stem of its files: `p0007-s3`."""
        return f"{self.prompt.prompt_id}-s{self.seed}"

    @property
    def label(self) -> str:
        """Name in messages: `freespec/p0007-s3`."""
        return f"{self.variant}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A suite with seeds and variants.

    Attributes:
        suite: the prompts.
        variants: the methods with their settings.
        config_ids: by label.
        items: in the order in which they are made.
        trees: the configurations by their id.
        device: kind of device that all videos of the folder must be made on; None lets them differ.
        given: settings of the given frames, the same for every item; None without any.
    """

    suite: Suite
    variants: tuple[Variant, ...]
    config_ids: Mapping[str, str]
    items: tuple[Item, ...]
    trees: Mapping[str, Mapping[str, Any]]
    device: str | None = None
    given: Mapping[str, Any] | None = None


def plan_batch(
    variants: Sequence[Variant],
    suite: Suite,
    *,
    seeds: Sequence[int],
    checkpoint: str,
    dtype: str,
    device: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Batch:
    """The items of a batch, seed by seed and prompt by prompt, so that all variants of a prompt and seed are made early.

    `checkpoint`, `dtype` and `given` are those of `engine.batch.identity.config_tree`. UserError for a variant, seed or prompt
    that is given twice.
    """
    check_variants(variants)
    check_once("--seeds", seeds)
    trees = {each.label: config_tree(each.config, checkpoint=checkpoint, dtype=dtype, given=given) for each in variants}
    ids = {label: config_id(tree) for label, tree in trees.items()}
    items = [
        Item(
            item_id=item_id(ids[variant.label], prompt=prompt.text, seed=seed),
            config_id=ids[variant.label],
            variant=variant.label,
            method=variant.method,
            prompt=prompt,
            seed=replace(variant.config.sampler, seed=seed).seed,  # which checks it
        )
        for seed in seeds
        for prompt in suite.prompts
        for variant in variants
    ]
    return Batch(
        suite=suite,
        variants=tuple(variants),
        config_ids=ids,
        items=tuple(items),
        trees={ids[label]: tree for label, tree in trees.items()},
        device=device,
        given=given,
    )


def requested_items(root: Path) -> dict[str, str] | None:
    """Read label and item_id of every item ever requested in a folder; None if `batch.json` does not list them."""
    tree = read_tree(root / FILE, {"schema": int}, what="a batch's description")
    items = (tree or {}).get("items")
    if tree is None or items is None:
        return None
    check_tree(root / FILE, tree, {"items": dict}, what="a batch's description")
    return items


def claim_folder(root: Path, batch: Batch) -> None:
    """Write the folder's description to `batch.json`; UserError, naming what differs, if it has another content.

    Prompts, seeds and variants may be added later, but those listed may not change. `items` lists all that were ever
    requested, so that missing ones can be found.
    """
    path = root / FILE
    (root / "locks").mkdir(exist_ok=True)
    with locked(root / "locks" / "batch.lock"):  # drivers of other shards may start at the same time
        before = check_folder(root, batch)
        items = before.get("items", {}) | {item.label: item.item_id for item in batch.items}
        after = describe(batch, before) | {"items": dict(sorted(items.items()))}
        if after != before:
            write_json(path, after)


def check_folder(root: Path, batch: Batch) -> Mapping[str, Any]:
    """Read `batch.json`; UserError if the batch cannot continue in the folder. Changes nothing."""
    path = root / FILE
    before = read_tree(path, {"schema": int}, what="a batch's description") or NOTHING
    if before["schema"] != SCHEMA:
        raise UserError(f"{path} was written by another version of this program; choose another folder")
    check_tree(path, before, SHAPE, what="a batch's description")
    if (wrong := lacking_inside(before)) is not None:
        raise DamagedError(f"{path} is not a batch's description: {wrong}")
    check_same(root, before, batch)
    return before


def lacking_inside(tree: Mapping[str, Any]) -> str | None:
    """Return what is wrong inside a description of the right `SHAPE`, or None."""
    for name, config in tree["configs"].items():
        if (wrong := lacking(config, {"method.name": str})) is not None:
            return f"of the configuration {name}, {wrong}"
    for kind in ("prompts", "items", "variants"):
        entries = tree.get(kind, {})
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            return f"{kind} is {entries!r:.60}"
    if not set(known_variants(tree).values()) <= tree["configs"].keys():
        return "a variant has no configuration"
    return None


def check_same(place: Path, before: Mapping[str, Any], batch: Batch, *, where: str = "folder") -> None:
    """Raise UserError if a variant or a prompt differs from that in a folder or file, which the message calls `where`."""
    device = before.get("device", batch.device)
    if batch.device not in (None, device):
        raise UserError(
            f"{place} holds videos made on {device}, and these are made on {batch.device}; choose another {where}"
        )
    known = known_variants(before)
    for label, config in batch.config_ids.items():
        if label in known and (different := changes(before["configs"][known[label]], batch.trees[config])):
            raise UserError(
                f"{place} holds {label} videos of another configuration; changed: {', '.join(different)}; "
                f"choose another {where}, or the same settings"
            )
    for prompt in batch.suite.prompts:
        old_text = before["prompts"].get(prompt.prompt_id, prompt.text)
        if old_text != prompt.text:
            raise UserError(
                f"{place} holds another prompt {prompt.prompt_id} (line {prompt.line} of "
                f"{prompt.source or batch.suite.name} is "
                f"{_short(prompt.text)}, before it was {_short(old_text)}); lines may be added at the end only"
            )


def known_variants(before: Mapping[str, Any]) -> dict[str, str]:
    """The config_id of each variant in a batch's description; folders of older versions name methods alone."""
    return before.get("variants") or {tree["method"]["name"]: name for name, tree in before["configs"].items()}


def describe(batch: Batch, before: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what decides the videos of a batch, merged into `before`; new variants come last."""
    prompts = {prompt.prompt_id: prompt.text for prompt in batch.suite.prompts}
    device = before.get("device", batch.device)
    return {
        "schema": SCHEMA,
        "configs": dict(sorted({**before["configs"], **batch.trees}.items())),
        "variants": {**known_variants(before), **batch.config_ids},
        "prompts": dict(sorted({**before["prompts"], **prompts}.items())),
    } | ({} if device is None else {"device": device})


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
