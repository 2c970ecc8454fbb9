"""What benchmarks/gpu.py measures, a file per section: each runs in a process of its own and writes its own JSON."""
