"""Which patterns and sizes a calibration tries if it is not told."""

from __future__ import annotations

from mpass.patterns.base import Pattern, registered_patterns
from mpass.patterns.dense import Dense


def default_candidates() -> tuple[Pattern, ...]:
    """Dense attention first, then what every pattern offers, in the order of their names."""
    listed: list[Pattern] = [Dense()]
    for _, cls in sorted(registered_patterns().items()):
        listed += cls.candidates()
    return tuple(dict.fromkeys(listed))
