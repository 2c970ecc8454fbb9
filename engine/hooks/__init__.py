"""Hooks and processors on a pipeline, and checks that they are still active."""
