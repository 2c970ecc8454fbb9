"""Benchmarks: scripts for a CPU, and `benchmarks.gpu` for a GPU. Each prints tables and writes JSON files to benchmarks/results/."""
