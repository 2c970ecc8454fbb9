"""Checks that a timeline on a pipeline is still active: around each call of the pipeline and before each forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.hooks.in_force import Guard, guarded


@dataclass(kw_only=True, eq=False)
class TimelineGuard(Guard):
    """What `apply_timeline` installed on the cross-attentions of a pipeline, and the check that all of it is still there.

    Attributes:
        hooks: one on each transformer, which plans the pieces of a forward.
    """

    APPLY = "apply_timeline"
    ATTENTION = "cross-attention"

    hooks: Sequence[RemovableHandle]
    _own_hooks: Sequence[RemovableHandle] = field(init=False)

    def __post_init__(self) -> None:
        """Check every call and forward from now on."""
        every = self.transformers.values()
        self._own_hooks = [transformer.register_forward_pre_hook(self._before_forward) for transformer in every]
        self.pipe.__class__ = guarded(type(self.pipe), self)

    @property
    def name(self) -> str:
        """See the base class."""
        return "the timeline"

    def modules(self, transformer: nn.Module) -> list[nn.Module]:
        """See the base class."""
        return self.adapter.cross_attention_modules(transformer)

    def registered(self) -> Sequence[RemovableHandle]:
        """See the base class."""
        return [*self.hooks, *self._own_hooks]

    def leave(self) -> None:
        """See the base class."""
        for hook in self._own_hooks:
            hook.remove()
        super().leave()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wrap one call of the pipeline: raise UserError before or after it if the timeline is inactive."""
        if self.removed:
            yield
            return
        self.check()
        yield
        if not self.removed:
            self.check()

    def _before_forward(self, _transformer: nn.Module, _args: tuple) -> None:
        if not torch.compiler.is_compiling():  # a compiled transformer guards its processors itself
            self.check()
