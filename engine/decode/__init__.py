"""Decoding of latents to frames: in chunks of time, in tiles, over all ranks."""
