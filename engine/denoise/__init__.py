"""From noise to latents: schedulers, the denoising loop, and saved latents and runs."""
