"""Latents to frames: in pieces of time, in tiles, on all ranks."""
