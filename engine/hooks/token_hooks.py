"""Forward hooks that shard tokens over the ranks, and lower a frequency of the rotary table of a long video."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.errors import UserError
from engine.hooks.in_force import Uncopyable
from engine.hooks.state import NO_FORWARD, RunState
from freespec.riflex import Riflex, lowered_frequency
from freespec.rotary import with_frequency
from freespec.tiers import frame_rotation
from parallel.attention import SequenceLayout
from parallel.shards import length


class TokenHooks(Uncopyable):
    """Forward hooks that shard tokens after patch embedding and rotary table, and gather them after the output projection.

    Attributes:
        registered: the hooks, on the current modules.
    """

    def __init__(self, state: RunState, transformer: nn.Module, riflex: Riflex | None = None) -> None:
        self._state = state
        self._transformer = transformer
        self._riflex = riflex if riflex is not None and riflex.enabled else None
        self._points: tuple[nn.Module, ...] = ()
        self._pairs: list[tuple[float, slice]] = []  # temporal frequencies, if one is to be lowered
        self.registered: list[RemovableHandle] = []
        self.follow()

    def follow(self) -> None:
        """Move the hooks to modules that replaced theirs, such as a LoRA around a projection."""
        points = self._state.setup.adapter.shard_points(self._transformer)
        if self._points and all(now is before for now, before in zip(points, self._points, strict=True)):
            return
        self.remove()
        self._points = embedding, rotary, output = points
        lower = []
        if self._riflex is not None:
            self._pairs = self._state.setup.adapter.temporal_frequencies(
                self._transformer
            )  # here, not in a forward, as it waits for a GPU
            # The whole table is lowered, before ranks take their rows.
            lower = [rotary.register_forward_hook(self.lower_frequency)]
        self.registered = [
            *lower,
            embedding.register_forward_hook(self.shard_embedding),
            rotary.register_forward_hook(self.shard_rotary),
            output.register_forward_hook(self.gather_output),
        ]
        condition = self._state.setup.adapter.shard_condition(self._transformer)
        if condition is not None:
            self.registered.append(condition.register_forward_pre_hook(self.shard_timesteps, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks and their copies, which torch's quantization puts on modules that replace others."""
        for module in self._transformer.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "__self__", None) is self:
                        del hooks[key]
        self.registered = []

    @property
    def _layout(self) -> SequenceLayout:
        if not self._state.running:
            raise UserError(f"a part of the transformer {NO_FORWARD}")
        return self._state.last.layout

    @torch.compiler.disable
    def lower_frequency(self, _module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Lower one temporal frequency of the rotary table of a long video (freespec.riflex)."""
        assert self._riflex is not None, "registered only with RIFLEx"
        grid, frequencies = self._state.last.grid, [frequency for frequency, _ in self._pairs]
        change = lowered_frequency(self._riflex, frequencies, num_frames=grid.frames, window_frames=grid.window_frames)
        if change is None:
            return tables
        pair, frequency = change
        return with_frequency(tables, frequency, columns=self._pairs[pair][1], frame_tokens=grid.frame_tokens)

    @torch.compiler.disable
    def shard_timesteps(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Select the timesteps of this rank's tokens, for a model with one of each token."""
        shard = self._layout.shard
        return self._state.setup.adapter.shard_timesteps(args, kwargs, shard[0], length(shard))

    @torch.compiler.disable
    def shard_embedding(self, _module: nn.Module, _args: tuple, embedded: Tensor) -> Tensor:
        """Select this rank's tokens."""
        shard = self._layout.shard
        return self._state.setup.adapter.shard_embedding(embedded, shard[0], length(shard))

    @torch.compiler.disable
    def shard_rotary(self, _module: nn.Module, _args: tuple, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Select this rank's rows of the rotary tables; for tiers keep those of each frame, of the heads that it attends."""
        layout, forward = self._layout, self._state.last
        shard = layout.shard
        if forward.mode == "tiers":
            config: Any = self._transformer.config
            head_dim: int = config.attention_head_dim
            made = frame_rotation(tables, frame_tokens=forward.grid.frame_tokens, head_dim=head_dim)
            own = slice(*layout.head_share) if made[0].shape[1] > 1 else slice(None)
            forward.rotation = made[0][:, own].clone(), made[1][:, own].clone()
        return self._state.setup.adapter.shard_rotary(tables, shard[0], length(shard))

    @torch.compiler.disable
    def gather_output(self, _module: nn.Module, _args: tuple, projected: Tensor) -> Tensor:
        """Gather the tokens of all ranks."""
        return self._layout.gather_tokens(projected)
