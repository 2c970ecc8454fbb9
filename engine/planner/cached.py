"""The steps in which a step cache runs the transformer's blocks, where a schedule decides it (`sampler.cache` mag and taylorseer)."""

from collections.abc import Sequence

import torch
from diffusers.hooks.mag_cache import nearest_interp

from engine.config import SamplerConfig

SCHEDULED = ("mag", "taylorseer")
# Defaults of diffusers, which engine.hooks.step_cache leaves: steps of TaylorSeer, share of MagCache's, and how many it skips in a row.
WARMUP = 3
RETAINED, MOST_IN_A_ROW = 0.2, 3


def computed_steps(sampler: SamplerConfig, experts: Sequence[str], modes: Sequence[str]) -> list[bool]:
    """Whether each step runs the blocks, given its transformer and mode; every step without a cache, or with one that decides by values.

    A cache is emptied where the mode or the transformer changes.
    """
    kinds = list(zip(experts, modes, strict=True))
    begins = [step == 0 or kinds[step - 1] != kind for step, kind in enumerate(kinds)]
    if sampler.cache == "taylorseer":
        return _by_interval(begins, int(sampler.cache_settings["cache_interval"]))
    if sampler.cache == "mag":
        return _by_ratios(begins, experts, sampler)
    return [True] * len(kinds)


def _by_interval(begins: Sequence[bool], interval: int) -> list[bool]:
    computed, since = [], 0
    for begin in begins:
        since = 0 if begin else since + 1
        computed.append(since < WARMUP or (since - WARMUP - 1) % interval == 0)
    return computed


def _by_ratios(begins: Sequence[bool], experts: Sequence[str], sampler: SamplerConfig) -> list[bool]:
    """A step is skipped while the errors of the ratios' products since the last computed one add up to the threshold at most.

    In float32 tensors as in MagCache's hook, so that an error at the threshold falls on the same side.
    """
    ratios = nearest_interp(torch.tensor(sampler.cache_settings["cache_ratios"]), len(begins))
    computed: list[bool] = []
    keeps, product, error, skipped = False, 1.0, 0.0, 0
    for step, begin in enumerate(begins):
        if begin:
            keeps, product, error, skipped = False, 1.0, 0.0, 0
        own = [other for other, expert in enumerate(experts) if expert == experts[step]]
        if step - own[0] >= int(RETAINED * len(own) + 0.5):
            product = product * ratios[step]
            error, skipped = error + abs(1.0 - product), skipped + 1
            if keeps and error <= sampler.cache_settings["cache_threshold"] and skipped <= MOST_IN_A_ROW:
                computed.append(False)
                continue
            product, error, skipped = 1.0, 0.0, 0
        keeps = True
        computed.append(True)
    return computed
