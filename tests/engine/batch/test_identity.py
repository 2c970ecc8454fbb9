"""Ids change with every setting that determines the pixels, and with no other."""

import dataclasses
import json

import pytest
import torch

from engine.batch.identity import canonical, changes, config_id, config_tree, item_id
from engine.config import RunConfig
from freespec.methods import Direct, FreeNoise
from tests.engine.batch.cases import batch, config


def id_of(run: RunConfig, checkpoint: str = "c") -> str:
    return config_id(config_tree(run, checkpoint=checkpoint, dtype="float32"))


def with_field(run: RunConfig, part: str, **values: object) -> RunConfig:
    return dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **values)})


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("video", {"num_frames": 21}),
        ("video", {"fps": 8}),
        ("sampler", {"num_steps": 5}),
        ("sampler", {"negative_prompt": "bad"}),
        ("method", {"name": "direct"}),
        ("method", {"window_frames": 4}),
        ("attention", {"kernel": "plain"}),
        ("decode", {"mode": "tiled"}),
        ("output", {"crf": 30}),
    ],
)
def test_what_decides_the_video_changes_the_id(part: str, values: dict[str, object]) -> None:
    assert id_of(with_field(config(), part, **values)) != id_of(config())


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("sampler", {"seed": 7}),
        ("model", {"device": "cuda", "path": "elsewhere", "weights": "cpu_offload"}),
        ("parallel", {"ulysses": 2, "timeout": 5.0}),
        ("output", {"path": "a.mp4", "progress": "on", "sheet_frames": 3}),
    ],
)
def test_ranks_devices_and_folders_do_not(part: str, values: dict[str, object]) -> None:
    assert id_of(with_field(config(), part, **values)) == id_of(config())


def test_the_checkpoint_counts_and_so_do_a_method_s_own_settings() -> None:
    assert id_of(config(), "d") != id_of(config())
    other = dataclasses.replace(config().method.freespec, alpha=1.0)
    assert id_of(with_field(config(), "method", freespec=other)) != id_of(config())
    direct = with_field(config(), "method", name="direct")
    strided = with_field(config(), "method", name="freenoise", freenoise=FreeNoise(stride=1))
    assert config_tree(strided, checkpoint="c", dtype="float32")["sampler"]["noise_stride"] == 1  # of its noise as well
    assert id_of(with_field(direct, "method", freespec=other)) == id_of(direct)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InDoubles(Direct):
    """A user's own method with a setting that JSON does not know."""

    dtype: torch.dtype = torch.float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class InSingles(InDoubles):
    """The same in fp32."""

    dtype: torch.dtype = torch.float32


def test_a_user_s_own_method_may_have_any_setting() -> None:
    ids = {id_of(with_field(config(), "method", name=f"{__name__}:{name}")) for name in ("InDoubles", "InSingles")}
    assert len(ids) == 2


def test_items_differ_by_prompt_seed_and_configuration_and_not_by_place() -> None:
    items = batch().items
    assert len({item.item_id for item in items}) == len(items) == 8
    moved = batch("a blue star", "a red circle", "more").items
    assert {item.item_id for item in items} < {item.item_id for item in moved}
    assert item_id("a", prompt="p", seed=1) != item_id("a", prompt="p", seed=2) != item_id("b", prompt="p", seed=2)


def test_given_frames_are_in_the_id_and_without_any_it_is_as_before() -> None:
    def id_with(given: dict[str, object] | None) -> str:
        return config_id(config_tree(config(), checkpoint="c", dtype="float32", given=given))

    extended = {"images": {}, "extend": "0a", "shows": "whole"}
    others = [extended | {"extend": "0b"}, extended | {"shows": "new"}, extended | {"images": {"0": "0a"}}]
    assert id_with(None) == id_of(config())
    assert len({id_with(given) for given in (None, extended, *others)}) == 5


def test_all_methods_of_a_prompt_and_seed_have_one_seed() -> None:
    pairs = {(item.prompt.text, item.seed): 0 for item in batch().items}
    assert len(pairs) == 4
    assert [item.method for item in batch().items[:2]] == ["freespec", "direct"]


def test_changes_names_keys_and_values_and_survives_json() -> None:
    old = config_tree(config(), checkpoint="c", dtype="float32")
    new = config_tree(with_field(config(), "video", num_frames=33), checkpoint="c", dtype="bfloat16")
    assert changes(old, new) == ["model.dtype float32 -> bfloat16", "video.num_frames 17 -> 33"]
    assert changes(json.loads(canonical(old)), old) == []
    assert changes({"a": 1}, {"b": 2}) == ["a 1 -> (not set)", "b (not set) -> 2"]
