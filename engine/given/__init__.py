"""Given frames: images at moments of a video, or a video to continue."""
