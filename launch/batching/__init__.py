"""Replicas of batch.py and other commands: their devices, workers and messages, and the videos of comparisons."""
