"""Result files: atomic writes, claims by one process at a time, and checks before anything is computed."""
