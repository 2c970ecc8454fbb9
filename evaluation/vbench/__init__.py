"""VBench-Long in its own environment: prompt suites, staging, one process per dimension, and the scores that it writes."""
