"""One process of a command: its environment, its arguments before they are parsed, its signals, its streams and its exit code."""
