"""The findings' section on Wan2.1, with the shares of fused steps counted on the schedulers' own timesteps."""

import dataclasses
from typing import TYPE_CHECKING

from engine.config import FreeSpec, SamplerConfig

if TYPE_CHECKING:
    from engine.planner.model import ModelSpec

WAN, EMBEDDED = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "tiny/wan"

_TEXT = """## What transfers to Wan2.1, and what cannot be known without its weights

Properties of the method transfer: each equals its published form, a step of each kind costs as many attention calls, all ranks make
the same video, and two rows of the ablation differ by their settings alone. `--config configs/wan2.1-t2v-1.3b.yaml` makes the same tables,
without the exact measures.

The best settings need not transfer. How many steps a `fused_share` fuses depends on the scheduler's shift (with `domain: timestep`,
fused_share {fused_share:g} fuses {fused}), and `alpha` acts along the same axis. `beta` acts along a spectrum of D directions,
{head_dim} of a head of Wan. How strongly the global branch over-smooths depends on training data and length. Without Wan's weights
the level of every measure is unknown, as are its spectra (Fig. 2), the order of the methods (Table 1) and its VBench scores
([vbench.md](vbench.md))."""

_SHIFTS = (5.0, 8.0)


def transfer_section(wan: "ModelSpec", embedded: "ModelSpec") -> str:
    """Describe what transfers to Wan2.1, in Markdown, from the published numbers of `WAN` and those of `EMBEDDED`."""
    method, sampler = FreeSpec(), SamplerConfig()

    def share(model: "ModelSpec", shift: float | None) -> str:
        given = dataclasses.replace(sampler, flow_shift=shift)
        # Wan's timesteps are the same for any size.
        modes = [step.mode for step in method.plan(model.timesteps(given, (1, 1, 1), window_frames=1))]
        return f"{100 * modes.count('dual') / len(modes):.0f} %"

    shares = [f"{share(wan, shift)} at shift {shift:g}" for shift in _SHIFTS]
    fused = f"of {sampler.steps} steps {', '.join(shares)}, and {share(embedded, None)} on the embedded model"
    return _TEXT.format(fused_share=method.fused_share, fused=fused, head_dim=wan.head_dim)
