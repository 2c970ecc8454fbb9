"""Step caches of diffusers (`sampler.cache`), with decisions that all ranks share, and the end of what a cache may reuse."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import HookRegistry, MagCacheConfig
from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK, FBCHeadBlockHook
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.mag_cache import MagCacheState, nearest_interp
from torch import Tensor, nn

from engine.config import SamplerConfig
from engine.devices import wait_for
from engine.errors import UserError
from engine.hooks.state import RunState
from parallel.collectives import max_over_ranks, sum_over_ranks

# Tokens whose numbers are copied to fp64 at a time.
FP64_TOKENS = 2048
# Bits of a sum of integers that are left to a batch of two passes, and the sign.
SPARE_BITS = 2


@contextmanager
def step_cache(
    state: RunState, steps: Mapping[str, Sequence[int]], pipe: Any, sampler: SamplerConfig
) -> Iterator[None]:
    """Put the cache of `sampler` on the transformers for one run; at its end the pipeline is as before.

    `steps` are those of each transformer, by part.
    """
    enabled = []
    try:
        for part, own in steps.items():
            if sampler.cache == "none" or not own:
                continue
            transformer = getattr(pipe, part)
            if transformer.is_cache_enabled:
                raise UserError(
                    f"sampler.cache {sampler.cache}: the {part} has a cache already; call its disable_cache(), or set sampler.cache none"
                )
            transformer.enable_cache(cache_config(sampler, own))
            enabled.append(transformer)
            if sampler.cache == "first_block":
                share_decision(state, transformer, sampler.cache_settings["cache_threshold"])
        yield
    finally:
        for transformer in enabled:
            transformer.disable_cache()


def cache_config(sampler: SamplerConfig, steps: Sequence[int]) -> Any:
    """Diffusers' configuration of the cache of a transformer that denoises these steps."""
    settings = sampler.cache_settings
    if sampler.cache == "first_block":
        return FirstBlockCacheConfig(threshold=settings["cache_threshold"])
    if sampler.cache == "mag":
        every = nearest_interp(torch.tensor(settings["cache_ratios"]), sampler.steps).tolist()
        return MagCacheConfig(
            threshold=settings["cache_threshold"],
            num_inference_steps=len(steps),
            mag_ratios=[every[step] for step in steps],
        )
    # The output projection alone is kept: by default diffusers looks for attentions of other names, and would find none.
    return TaylorSeerCacheConfig(
        cache_interval=settings["cache_interval"], taylor_factors_dtype=torch.float32, use_lite_mode=True
    )


def share_decision(state: RunState, transformer: Any, threshold: float) -> None:
    """Replace the decision of diffusers' first block cache, which sees one rank's tokens, by that of all tokens."""
    head: Any = next(iter(state.setup.adapter.blocks(transformer)))
    registry = HookRegistry.check_if_exists_or_initialize(head)
    manager = registry.get_hook(_FBC_LEADER_BLOCK_HOOK).state_manager
    registry.remove_hook(_FBC_LEADER_BLOCK_HOOK, recurse=False)
    registry.register_hook(SharedFirstBlock(manager, threshold, state), _FBC_LEADER_BLOCK_HOOK)


class SharedFirstBlock(FBCHeadBlockHook):
    """The first block of FirstBlockCache: its residual over all tokens decides whether the other blocks run."""

    def __init__(self, manager: StateManager, threshold: float, state: RunState) -> None:
        super().__init__(manager, threshold)
        self._state = state

    @torch.compiler.disable
    def _should_compute_remaining_blocks(self, hidden_states_residual: Tensor) -> bool:
        before = self.state_manager.get_state().head_block_residual
        if before is None:
            return True
        change = relative_change(self._state, hidden_states_residual, before)
        return not change <= self.threshold  # NaN computes


def relative_change(state: RunState, now: Tensor, before: Tensor) -> float:
    """Mean of |now - before| over the mean of |before|, [B, s, C], over all tokens: the same bits on any number of ranks.

    Where guidance is a batch, the tokens of both passes decide together, also when each half of the ranks runs one.
    """
    layout, setup = state.last.layout, state.setup
    group = (setup.mesh.world if setup.adapter.batches_guidance else setup.mesh.sequence).group
    bits = 64 - SPARE_BITS - (layout.plan.tokens * now.shape[2]).bit_length()
    pairs = list(zip(now.split(FP64_TOKENS, dim=1), before.split(FP64_TOKENS, dim=1), strict=True))
    zero = now.new_zeros(2, dtype=torch.float64)
    parts = [torch.stack([(new - old).abs().amax(), old.abs().amax()]).double() for new, old in pairs if new.numel()]
    largest = max_over_ranks(torch.stack([zero, *parts]).amax(0), group=group, trace=layout.trace)
    exponents = torch.frexp(largest).exponent
    sums = [
        torch.stack([whole_sum(new - old, bits - exponents[0]), whole_sum(old, bits - exponents[1])])
        for new, old in pairs
    ]
    total = sum_over_ranks(torch.stack([zero.long(), *sums]).sum(0), group=group, trace=layout.trace)
    wait_for(now.device)  # reading them would block in C, where no signal is handled
    difference, size = (total.double() * torch.exp2(exponents.double())).tolist()
    finite = bool(torch.isfinite(largest).all())
    return difference / size if finite and size > 0 else float("inf")


def whole_sum(x: Tensor, shift: Tensor) -> Tensor:
    """Sum of |x| · 2^shift as an integer, without rounding beyond that of each number: in any order the same."""
    return (x.double().abs() * torch.exp2(shift.double())).round().long().sum()


def forget_steps(transformer: nn.Module) -> None:
    """Drop what diffusers' caches kept of earlier steps; MagCache still knows which step it is, and so which ratio."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
            for manager in managers:
                _renew(manager)
            if hook._is_stateful and not managers:
                hook.reset_state(module)


def _renew(manager: StateManager) -> None:
    for name, old in manager._state_cache.items():
        new = manager._state_cls(*manager._init_args, **manager._init_kwargs)
        if isinstance(old, MagCacheState):
            new.step_index = old.step_index
        manager._state_cache[name] = new
