"""Plain torch: what the generated kernels of every device must compute, file by pattern."""
