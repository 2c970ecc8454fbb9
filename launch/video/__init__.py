"""One video: its files, the stages that are left, making it, and messages for an early end."""
