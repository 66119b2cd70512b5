"""Numbers by which ops know their attention, the same in every process."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

from mpass.graph.site import AttentionSite
from mpass.patterns.base import Pattern, patterns_as_text


def site_number(site: AttentionSite, patterns: Sequence[Pattern]) -> int:
    """What an op remembers its calls by; 0 for none.

    Dense attention with a softcap or sinks is not as fast as lowerings take it to be: there nothing
    that is remembered may choose it.
    """
    if site.softcap > 0 or site.sinks is not None:
        return 0
    return checksum(f"{site.layer} {site.path} {site.output.name} {patterns_as_text(patterns)}")


def meter_number(site: AttentionSite) -> int:
    """What the meter knows an attention by; never 0."""
    return checksum(f"{site.layer} {site.path} {site.output.name} {site.source}")


def checksum(name: str) -> int:
    """A number of 32 bits, never 0."""
    return 1 + zlib.crc32(name.encode())


def kept_number(site: AttentionSite) -> int:
    """What is kept over denoising steps goes by this number: no other site of a graph has it."""
    digest = hashlib.sha256(f"{site.path} {site.output.name}".encode()).digest()
    return int.from_bytes(digest[:7])
