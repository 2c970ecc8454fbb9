"""Hooks and processors on a pipeline, and the checks that they are in force."""
