"""Everything that a batch shall make: prompts x seeds x methods as items, and the folder that they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.batch.identity import changes, config_id, config_tree, item_id
from engine.batch.suite import Prompt, Suite, check_once
from engine.config import RunConfig
from engine.errors import UserError
from engine.files.locks import locked
from engine.files.trees import DamagedError, Shape, check_tree, lacking, read_tree
from engine.files.whole import write_json

SCHEMA = 1
FILE = "batch.json"
SHAPE: Shape = {"configs": dict, "prompts": dict}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One video of a batch.

    Attributes:
        item_id: what decides its pixels, hashed; see `engine.batch.identity`.
        config_id: the same for its configuration alone.
        method: name of the method.
        prompt: prompt, with its name.
        seed: of the noise, which is the same for every method.
    """

    item_id: str
    config_id: str
    method: str
    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """Stem of its files: `p0007-s3`."""
        return f"{self.prompt.prompt_id}-s{self.seed}"

    @property
    def label(self) -> str:
        """For a person: `freespec/p0007-s3`."""
        return f"{self.method}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A suite with seeds and methods: `items` in the order in which they are made, `trees` the configurations by their id."""

    suite: Suite
    items: tuple[Item, ...]
    trees: Mapping[str, Mapping[str, Any]]


def plan_batch(
    config: RunConfig, suite: Suite, *, methods: Sequence[str], seeds: Sequence[int], checkpoint: str, dtype: str
) -> Batch:
    """The items of a batch, prompt by prompt, so that all methods of one prompt and seed are there early.

    `checkpoint` and `dtype` are those of `engine.batch.identity.config_tree`. UserError for an unknown method, and for a
    method, seed or prompt that is given twice.
    """
    check_once("--methods", methods)
    check_once("--seeds", seeds)
    trees = {name: config_tree(with_method(config, name), checkpoint=checkpoint, dtype=dtype) for name in methods}
    ids = {name: config_id(tree) for name, tree in trees.items()}
    items = [
        Item(
            item_id=item_id(ids[method], prompt=prompt.text, seed=seed),
            config_id=ids[method],
            method=method,
            prompt=prompt,
            seed=replace(config.sampler, seed=seed).seed,  # which checks it
        )
        for prompt in suite.prompts
        for seed in seeds
        for method in methods
    ]
    return Batch(suite=suite, items=tuple(items), trees={ids[name]: trees[name] for name in methods})


def asked_items(root: Path) -> dict[str, str] | None:
    """Label and item_id of everything that was ever asked for in a folder; None where no batch has said so."""
    tree = read_tree(root / FILE, {"schema": int}, what="a batch's description")
    items = (tree or {}).get("items")
    if tree is None or items is None:
        return None
    check_tree(root / FILE, tree, {"items": dict}, what="a batch's description")
    return items


def with_method(config: RunConfig, name: str) -> RunConfig:
    """The same run with another method; UserError for one that does not exist."""
    try:
        return replace(config, method=replace(config.method, name=name))
    except ValueError as error:
        raise UserError(str(error)) from error


def claim_folder(root: Path, batch: Batch) -> None:
    """Note in `batch.json` what the folder holds; UserError if it holds something else, naming what has changed.

    Prompts, seeds and methods may be added to a folder later; what is there may not change its meaning. `items` lists all
    that were ever asked for, so that whoever reads the folder can tell whether they are there.
    """
    path = root / FILE
    (root / "locks").mkdir(exist_ok=True)
    with locked(root / "locks" / "batch.lock"):  # drivers of other shards may start at the same time
        before = check_folder(root, batch)
        after = _describe(batch, before)
        if after != before:
            write_json(path, after)


def check_folder(root: Path, batch: Batch) -> dict[str, Any]:
    """What `batch.json` says of the folder, if anything; UserError if the batch cannot go on in it. Changes nothing."""
    path = root / FILE
    before = read_tree(path, {"schema": int}, what="a batch's description") or {
        "schema": SCHEMA,
        "configs": {},
        "prompts": {},
    }
    if before["schema"] != SCHEMA:
        raise UserError(f"{path} was written by another version of this program; choose another --out")
    check_tree(path, before, SHAPE, what="a batch's description")
    if (wrong := _lacking_inside(before)) is not None:
        raise DamagedError(f"{path} is not a batch's description: {wrong}")
    check_same(root, before, batch)
    return before


def _lacking_inside(tree: Mapping[str, Any]) -> str | None:
    for name, config in tree["configs"].items():
        if (wrong := lacking(config, {"method.name": str})) is not None:
            return f"of the configuration {name}, {wrong}"
    for kind in ("prompts", "items"):
        entries = tree.get(kind, {})
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            return f"{kind} is {entries!r:.60}"
    return None


def check_same(root: Path, before: Mapping[str, Any], batch: Batch) -> None:
    """Raise UserError if a method or a prompt of the batch means something else in the folder."""
    known = {tree["method"]["name"]: tree for tree in before["configs"].values()}
    for tree in batch.trees.values():
        old = known.get(tree["method"]["name"])
        if old is not None and (different := changes(old, tree)):
            raise UserError(
                f"{root} holds {tree['method']['name']} videos of another configuration; changed: {', '.join(different)}; "
                "choose another --out, or the same settings"
            )
    for prompt in batch.suite.prompts:
        old_text = before["prompts"].get(prompt.prompt_id, prompt.text)
        if old_text != prompt.text:
            raise UserError(
                f"{root} holds another prompt {prompt.prompt_id} (line {prompt.line} of "
                f"{prompt.source or batch.suite.name} is "
                f"{_short(prompt.text)}, before it was {_short(old_text)}); lines may be added at the end only"
            )


def _describe(batch: Batch, before: Mapping[str, Any]) -> dict[str, Any]:
    prompts = {prompt.prompt_id: prompt.text for prompt in batch.suite.prompts}
    items = {item.label: item.item_id for item in batch.items}
    return {
        "schema": SCHEMA,
        "configs": dict(sorted({**before["configs"], **batch.trees}.items())),
        "prompts": dict(sorted({**before["prompts"], **prompts}.items())),
        "items": dict(sorted({**before.get("items", {}), **items}.items())),
    }


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
