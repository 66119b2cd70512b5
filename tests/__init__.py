"""Tests, in the folders of what they test; conftest.py holds what they share."""
