"""Finished videos: batches scored by VBench-Long, proxies and exact measures; comparisons, analyses, calibrations and studies."""
