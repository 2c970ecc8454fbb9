"""Checks that a timeline on a pipeline is in force: around each call of the pipeline and before each forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.adapters import ModelAdapter
from engine.adapters.base import unwrap
from engine.errors import UserError
from engine.in_force import Uncopyable, guarded, is_registered, parallel_problem, unguard

AGAIN = "call the timeline's remove(), then apply_timeline again"


@dataclass(kw_only=True, eq=False)
class TimelineGuard(Uncopyable):
    """What `apply_timeline` put on a pipeline, and whether all of it is still there.

    Attributes:
        pipe: the pipeline.
        adapter: of its model.
        transformer: its transformer, not the wrapper of torch.compile.
        processors: of the cross-attentions, first block first.
        hook: which plans the pieces of a forward.
        removed: whether the timeline was taken off.
    """

    pipe: DiffusionPipeline
    adapter: ModelAdapter
    transformer: nn.Module
    processors: Sequence[Any]
    hook: RemovableHandle
    removed: bool = False
    _own_hook: RemovableHandle = field(init=False)

    def __post_init__(self) -> None:
        """Check every call and forward from now on."""
        self._own_hook = self.transformer.register_forward_pre_hook(self._before_forward)
        self.pipe.__class__ = guarded(type(self.pipe), self)

    def leave(self) -> None:
        """Check no call any more, and give the pipeline its own class back."""
        self.removed = True
        self._own_hook.remove()
        unguard(self.pipe)

    def check(self) -> None:
        """Raise UserError, with the first reason found, unless the next forward of the pipeline has the timeline."""
        if found := self.problem():
            raise UserError(f"the timeline is not in force: {found}")

    def problem(self) -> str | None:
        """Why the timeline is not in force, and what to do; None if it is."""
        if self.removed:
            return "it was removed; call apply_timeline again"
        current = unwrap(vars(self.pipe).get("transformer"))
        if current is not self.transformer:
            kind = "None" if current is None else f"another {type(current).__name__}"
            return f"pipe.transformer is {kind}, not the one that it was applied to; {AGAIN}"
        if not (is_registered(self.hook) and is_registered(self._own_hook)):
            return f"its hooks were removed from the transformer; {AGAIN}"
        return self._layers() or parallel_problem(self.transformer)

    def _layers(self) -> str | None:
        try:
            modules = self.adapter.cross_attention_modules(self.transformer)
        except AttributeError as error:
            return f"the transformer's blocks were replaced ({error}); {AGAIN}"
        if len(modules) != len(self.processors):
            return f"the transformer has {len(modules)} cross-attentions and had {len(self.processors)}; {AGAIN}"
        for layer, (attn, processor) in enumerate(zip(modules, self.processors, strict=True)):
            if attn.processor is not processor:
                kind = type(attn.processor).__name__
                return f"layer {layer} has another cross-attention processor ({kind}); {AGAIN}"
        return None

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the pipeline: raise UserError before it, or after it, if the timeline is not in force."""
        if self.removed:
            yield
            return
        self.check()
        yield
        if not self.removed:
            self.check()

    def _before_forward(self, _transformer: nn.Module, _args: tuple) -> None:
        if not torch.compiler.is_compiling():  # a compiled transformer has guards of its own on its processors
            self.check()
