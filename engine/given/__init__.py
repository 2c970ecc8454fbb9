"""Frames of a video that exist before it is made."""
