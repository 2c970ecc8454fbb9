"""Encode prompts for the transformer: from a cache, by rank 0, or by all ranks that share the text encoder."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from engine.adapters import ModelAdapter
from engine.adapters.base import Text, join_texts
from engine.config import RunConfig
from engine.load.sharded_weights import Encode, encode_on_all, shards_text
from engine.ranks.agreement import broadcast, raise_together
from engine.text.cache import TextCache, cache_key
from engine.text.prompts import PROMPT, Named, refuse_long_prompts, texts_by_pass
from engine.text.timeline import Direction
from parallel.mesh import SeqMesh


class PromptEncoder:
    """Encodes prompts for all ranks of a mesh; every rank calls it with the same prompts."""

    def __init__(
        self,
        config: RunConfig,
        *,
        pipe: DiffusionPipeline,
        adapter: ModelAdapter,
        mesh: SeqMesh,
        device: torch.device,
        checkpoint: str,
    ) -> None:
        """`device` is the model's, `checkpoint` the digest of what was loaded, in hex."""
        self._pipe = pipe
        self._adapter = adapter
        self._mesh = mesh
        self._device = device
        self._encoder_device = torch.device("cpu") if config.parallel.text_device == "cpu" else device
        self._is_sharded = shards_text(config.model, config.parallel.text_device)
        self._max_tokens = config.sampler.max_text_tokens
        self._guided = config.sampler.guidance_scale > 1.0
        self._key = cache_key(
            checkpoint=checkpoint,
            dtype=str(pipe.transformer.dtype),
            max_text_tokens=self._max_tokens,
            device=self._encoder_device.type,
        )
        self.keep(None)

    def keep(self, folder: Path | None) -> None:
        """Cache embeddings in this folder from now on; None caches them in memory only."""
        self._cache = TextCache(self._key, folder)

    def passes(self, prompt: str, negative_prompt: str, direction: Direction | None) -> dict[str, Text]:
        """Encode the text of each pass, `cond` first and with guidance `uncond`; texts of a timeline's events are concatenated."""
        named = texts_by_pass((PROMPT, prompt), negative_prompt, direction, guided=self._guided)
        texts = iter(self.encode([text for each in named.values() for text in each]))
        return {name: join_texts([next(texts) for _ in each]) for name, each in named.items()}

    def encode(self, named: list[Named]) -> list[Text]:
        """Encode each prompt, on the device; UserError, on all ranks together, for prompts that are too long."""
        texts = raise_together(self._mesh, lambda: self._texts_or_empty(named))
        on_device = [tuple(part.to(self._device) for part in text) for text in texts]
        return [tuple(broadcast(self._mesh, part, "text embeddings") for part in text) for text in on_device]

    def _texts_or_empty(self, named: list[Named]) -> list[Text]:
        """The texts on rank 0, and tensors of their shape on the others."""

        def encode(new: list[str]) -> list[Text]:
            return self._adapter.encode_text(self._pipe, new, self._max_tokens, self._encoder_device)

        def look_up(encode: Encode) -> list[Text]:
            refuse_long_prompts(self._adapter, self._pipe.tokenizer, named, self._max_tokens)
            return self._cache.texts([text for _, text in named], encode)

        texts = None
        if self._is_sharded:
            texts = encode_on_all(self._mesh, encode, look_up)
        elif self._mesh.world.rank == 0:
            texts = look_up(encode)
        return texts or [
            self._adapter.empty_text(self._pipe.transformer, self._max_tokens, self._device) for _ in named
        ]
