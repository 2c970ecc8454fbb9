"""Scores of finished videos: proxies and exact measures beside VBench-Long's dimensions, their means, and the report."""
