"""Offline search: which pattern each head should use, under a budget for the whole model."""

from mpass.calibration.search import calibrate, run_calibration
from mpass.calibration.settings import Settings

__all__ = ["Settings", "calibrate", "run_calibration"]
