"""Replicas: groups of ranks that keep a model loaded and make one item after another, on this machine or through Ray."""
