"""The findings' section on Wan2.1, with the shares of fused steps counted on the schedulers' own timesteps."""

import dataclasses

from engine.config import FreeSpec, ModelConfig, SamplerConfig
from engine.planner.model import ModelSpec, read_model

_TEXT = """## What transfers to Wan2.1, and what cannot be known without its weights

What is a property of the method and not of a model transfers: the equality of every method with its published form, the cost of a step of
each kind in attention calls, that all ranks make the same video, that a difference between two rows of the ablation is that of their settings
alone. The commands transfer as they are: `--config configs/wan2.1-t2v-1.3b.yaml` makes the same tables, without the exact measures.

Which settings are best does not transfer by itself. The share of the steps that a `fused_share` means depends on the scheduler's shift (with
`domain: timestep`, fused_share {fused_share:g} fuses {fused}), and `alpha` is read along
that same axis. `beta` acts along a spectrum of D directions, {head_dim} of a head of Wan. How strongly the global branch over-smooths, and so how
much of it helps, is a matter of training data and length. Unknown without Wan's weights: the level of every measure, whether the
spectra concentrate as in the paper's Fig. 2, whether the order of the methods is that of its Table 1, and its VBench scores
([vbench.md](vbench.md) says how they are made)."""

_WAN, _SHIFTS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (5.0, 8.0)
_EMBEDDED = "tiny/wan"


def transfer_section() -> str:
    """Describe what transfers to Wan2.1, in Markdown; needs neither its weights nor a network."""
    method, sampler = FreeSpec(), SamplerConfig()
    wan, embedded = (read_model(ModelConfig(path=path, offline=True)) for path in (_WAN, _EMBEDDED))

    def share(model: ModelSpec, shift: float | None) -> str:
        given = dataclasses.replace(sampler, flow_shift=shift)
        # Wan's timesteps are the same for any size.
        modes = [step.mode for step in method.plan(model.timesteps(given, (1, 1, 1), window_frames=1))]
        return f"{100 * modes.count('dual') / len(modes):.0f} %"

    told = [f"{share(wan, shift)} at shift {shift:g}" for shift in _SHIFTS]
    fused = f"of {sampler.steps} steps {', '.join(told)}, and {share(embedded, None)} on the embedded model"
    return _TEXT.format(fused_share=method.fused_share, fused=fused, head_dim=wan.head_dim)
