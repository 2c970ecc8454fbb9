"""batch.py --status: the state of a batch, from another terminal."""

from launch.arguments.batch import Status
from launch.batching.terminal import show_status


def run(given: Status) -> int:
    """Print the state of every shard; returns the exit code."""
    return show_status(given.folder)
