"""Evaluation of batches: prompt suites, VBench-Long in its own environment, weight-free proxies, and the report."""
