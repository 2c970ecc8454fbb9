"""What is measured. Each script runs on CPU and CUDA, prints a table and writes a JSON file to benchmarks/results/."""
