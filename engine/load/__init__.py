"""Checkpoints: what they are, their weights and where those came from."""
