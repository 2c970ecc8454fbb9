"""From noise to latents: schedulers, the loop over their steps, and what is saved of a run."""
