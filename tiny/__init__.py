"""The embedded model: its procedural world, its training script and its weights."""
