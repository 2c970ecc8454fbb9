"""One process of a command: its signals, its streams and its exit code."""
