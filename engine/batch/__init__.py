"""Large batches: what is to be made, where it lies, what was tried, and a driver that keeps replicas busy."""
