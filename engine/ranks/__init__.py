"""The ranks that share a video: agreement between them, and layouts that a method supports."""
