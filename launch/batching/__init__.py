"""What batch.py does: its settings, where its replicas run, what its driver is given, and what a person is told."""
