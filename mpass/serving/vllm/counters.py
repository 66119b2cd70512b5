"""What the plugin did in this process: counted per layer and step, and shown where vLLM shows it.

With PROMETHEUS_MULTIPROC_DIR in the environment, as vLLM sets it where it has several servers, the
counts of every process are in vLLM's /metrics as `mpass:<name>_total`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

DESCRIPTIONS = {
    "prefills": "Long prefills, or chunks of them, that a step had for sparse attention",
    "prefill_tokens": "Tokens of these prefills",
    "sparse": "Attentions of one layer over one of these prefills that mpass computed",
    "gathered": "Those among them whose keys were copied out of pages",
    "parent": "Attentions of one layer over one step that vLLM computed whole",
    "ran_dense": "Attentions that mpass computed and found faster dense, if they are recorded",
    "failed": "Layers that were left to vLLM after a failure of mpass",
}


@dataclass
class Counters:
    """Counts since the process began; DESCRIPTIONS says of what.

    density: the sum of the densities of `recorded` attentions, the share of the causal cells that
    each computed; both stay 0 unless the setting "record" is on.
    """

    prefills: int = 0
    prefill_tokens: int = 0
    sparse: int = 0
    gathered: int = 0
    parent: int = 0
    ran_dense: int = 0
    failed: int = 0
    recorded: int = 0
    density: float = 0.0
    show: Callable[[str, int], object] = field(default=lambda name, count: None, repr=False)

    def add(self, name: str, count: int = 1) -> None:
        """Count something of DESCRIPTIONS."""
        setattr(self, name, getattr(self, name) + count)
        self.show(name, count)

    def record(self, density: float, dense: bool) -> None:
        """Count an attention whose density is known, and whether dense attention ran."""
        self.recorded += 1
        self.density += density
        if dense:
            self.add("ran_dense")

    def as_dict(self) -> dict[str, float]:
        """The counts by name, with the mean density of recorded attentions; 1.0 if there are none.

        Plain numbers, so that they can be sent from one process to another.
        """
        counts = asdict(self)
        counts.pop("show")
        counts["density"] = self.density / self.recorded if self.recorded else 1.0
        return counts


@functools.cache
def process_counters() -> Counters:
    """The counters of this process, which all layers share."""
    return Counters(show=metrics() or (lambda name, count: None))


def metrics() -> Callable[[str, int], object] | None:
    """What shows counts in vLLM's /metrics; None unless this process has a way to it."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    try:
        from prometheus_client import Counter

        made = {name: Counter(f"mpass:{name}", text) for name, text in DESCRIPTIONS.items()}
    except Exception:  # no prometheus_client, or names that are taken: counts stay in the process
        return None
    return lambda name, count: made[name].inc(count)
