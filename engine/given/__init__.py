"""Frames that a video is given: images at moments of it, or a video to continue."""
