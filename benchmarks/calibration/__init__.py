"""What a searched config is worth: `python -m benchmarks.calibration`."""
