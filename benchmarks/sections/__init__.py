"""The sections of benchmarks/gpu.py, one file each: each runs in a process and writes a JSON file."""
