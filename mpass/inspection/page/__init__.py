"""The page: an explanation or a profile as one HTML file that needs no network."""

from __future__ import annotations

from mpass.inspection.page.build import build_page

__all__ = ["build_page"]
