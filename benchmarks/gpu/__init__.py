"""Correctness and speed of the Triton kernels on a real GPU: `python -m benchmarks.gpu`."""
