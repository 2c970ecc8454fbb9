"""The ranks that share a video: their arrangement, agreement between them, and layouts that a method supports."""
