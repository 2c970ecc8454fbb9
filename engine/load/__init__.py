"""Checkpoints: identification, checks, loading and provenance of weights."""
