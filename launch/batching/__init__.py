"""batch.py: its options, replicas, work, and messages."""
