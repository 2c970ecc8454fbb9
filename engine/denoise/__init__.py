"""From noise to latents: the denoising loop, and saved runs."""
