"""Embeddings are made once per prompt and come back bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.text import cache as text_cache
from engine.text.cache import TextCache, trim


class Encoder:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, prompts: list[str]) -> list[tuple[torch.Tensor, ...]]:
        self.calls += prompts
        generator = torch.Generator().manual_seed(len(prompts[0]))
        embeds = torch.randn(1, 5, 3, generator=generator).to(torch.bfloat16)
        return [(embeds, torch.ones(1, 5, dtype=torch.int64)) for _ in prompts]


def same(one: tuple[torch.Tensor, ...], two: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one, two, strict=True))


def test_once_per_prompt_in_memory_and_in_a_folder(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "text"):
        encoder, cache = Encoder(), TextCache("key", folder)
        first = cache.texts(["a", "bb", "a"], encoder)
        assert encoder.calls == ["a", "bb"]
        assert same(first[0], first[2])
        assert not same(first[0], first[1])
        assert same(cache.texts(["bb"], encoder)[0], first[1])
        assert encoder.calls == ["a", "bb"]


def test_another_process_reads_the_same_bits(tmp_path: Path) -> None:
    encoder = Encoder()
    made = TextCache("key", tmp_path).texts(["a"], encoder)[0]
    found = TextCache("key", tmp_path).texts(["a"], encoder)[0]
    assert encoder.calls == ["a"]
    assert same(made, found)
    assert len(found) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-3],
        lambda data: b"",
        lambda data: data.replace(b'"BF16"', b'"BF61"'),
        lambda data: data.replace(b'"0"', b'"9"'),
    ],
    ids=["cut", "empty", "dtype", "name"],
)
def test_another_checkpoint_or_a_broken_file_is_encoded_anew(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    encoder = Encoder()
    TextCache("key", tmp_path).texts(["a"], encoder)
    TextCache("other", tmp_path).texts(["a"], encoder)
    assert encoder.calls == ["a", "a"]
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(damage(file.read_bytes()))
    TextCache("key", tmp_path).texts(["a"], encoder)
    assert len(encoder.calls) == 3
    assert sorted({file.suffix for file in tmp_path.iterdir()}) == [".safetensors"]


def test_memory_is_bounded_and_the_folder_remembers(tmp_path: Path) -> None:
    encoder, cache = Encoder(), TextCache("key", tmp_path)
    prompts = [str(index) for index in range(text_cache.KEPT + 3)]
    cache.texts(prompts, encoder)
    cache.texts(prompts, encoder)
    assert encoder.calls == prompts
    assert len(cache._kept) == text_cache.KEPT


def test_the_oldest_of_too_many_are_deleted(tmp_path: Path) -> None:
    for index, name in enumerate("cab"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(b"")
        os.utime(path, ns=(index, index))
    (tmp_path / "x.lock").touch()
    trim(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "x.lock"]
    trim(tmp_path / "none", 2)
