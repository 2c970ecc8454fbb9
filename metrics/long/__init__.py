"""Measures of long videos, which measures of consistency reward for loops and cannot tell from drift.

A folder of its own, as `metrics.timelines` is: kept measures carry a digest of the files in `metrics/`.
"""
