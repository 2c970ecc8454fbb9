"""Names of the attention kernels, apart from the kernels, so that settings are checked without importing torch."""

FA3 = "cuda_fa3"  # an optional package
NAMES = ("plain", "cpu_flash", "cuda_flash", "cuda_cudnn", "cuda_efficient", FA3)

# Kernels for the keys outside the windows in a dual step: that of all other keys, or one that quantises.
COMPLEMENTS = ("same", "sage")

# How a dual step computes its branches: dense calls on strided views, or one Triton kernel.
DUALS = ("strided", "triton")
