"""Measures of videos whose prompt changes over time.

A folder of its own: kept measures carry a digest of the files in `metrics/` (metrics/version.py), and those of videos of one prompt do not
depend on these. Measures of timelines carry a digest of both.
"""
