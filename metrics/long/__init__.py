"""Measures of long videos for loops, which consistency measures reward, and drift, which they miss.

A folder of its own, as `metrics.timelines` is: kept measures carry a digest of the files in `metrics/`.
"""
