"""Batches: items and their ids, files, queue, and the driver of replicas."""
