"""One video: its files, remaining stages, making it, and messages when a run ends early."""
