"""What decides about sparse attention on this machine's GPUs: the thin part that asks the device.

The decisions are pure functions (decisions.py, work_memory.py); here they get a chip, and numbers
that a GPU has counted.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mpass.lowering.crossover import LayerWork, LeastLengths, PatternWork
from mpass.lowering.density import causal_work_share
from mpass.lowering.device import SHORTEST_PROMPT
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.chips import H100, Chip, find_chip
from mpass.lowering.triton.cost_constants import measured_chip
from mpass.lowering.triton.cost_model import breakeven_share, predict
from mpass.lowering.triton.decisions import FEWEST_PROBES, SURE, calls_until_probe, known
from mpass.lowering.triton.decisions import least_lengths as least_lengths_of
from mpass.lowering.triton.work_memory import Key, Limits, Reading, WorkMemory

READINGS = 4096
"""Numbers of pinned memory: readings that can be under way at a time, and some."""


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a device, with what was measured on this machine; without a GPU an H100."""
    if not torch.cuda.is_available():
        return H100
    found = torch.cuda.get_device_properties(device)
    architecture = f"sm_{found.major}{found.minor}"
    if torch.version.hip:
        architecture = found.gcnArchName.split(":")[0]
    return measured_chip(find_chip(found.name, architecture, found.multi_processor_count), device)


def least_lengths(work: LayerWork, device: torch.device) -> LeastLengths:
    """The shortest prompt, and chunk of one, from which sparse attention pays on a device."""
    if not known(work):
        return LeastLengths(SHORTEST_PROMPT, SHORTEST_PROMPT)
    return least_lengths_of(chip_of(device), work)


def begin_call(
    inputs: AttentionInputs,
    name: str,
    parts: tuple[PatternWork, ...],
    site: int,
    dense_above: float,
) -> str:
    """Why a call runs dense by what an earlier one selected, in words; "" for sparse.

    name, parts: of the op that is about to estimate, and its patterns; site: as of the ops.
    """
    key = key_of(inputs, site)
    if key is None:
        return ""
    query, keys = inputs.query, inputs.key

    def limits(parts: tuple[PatternWork, ...], share: float) -> Limits:
        dim = query.shape[3]
        # What the host takes is known from calls, and not predicted.
        work = LayerWork(query.dtype, dim, dim, keys.shape[1], parts, replayed=True)
        return limits_of(
            chip_of(query.device),
            work,
            query.shape[2],
            query.shape[0],
            round(share, 2),
            dense_above,
        )

    return memory_of(query.device).begin(key, name, parts, limits)


@functools.lru_cache(maxsize=4096)
def limits_of(
    chip: Chip, work: LayerWork, length: int, batch: int, share: float, dense_above: float
) -> Limits:
    """What decides about calls whose share of the dense work is known."""
    if not known(work):
        return Limits(dense_above, math.inf, math.inf, lambda sparse: FEWEST_PROBES)
    most = breakeven_share(chip, work, queries=length, keys=length, batch=batch, speedup=SURE)
    found = predict(chip, work, keys=length, batch=batch, density=share)

    def interval(sparse: float) -> int:
        return calls_until_probe(found.dense / sparse) if sparse < math.inf else FEWEST_PROBES

    return Limits(min(most, dense_above), found.dense, found.sparse, interval)


def decided(inputs: AttentionInputs, site: int) -> str:
    """What `begin_call` has answered for the call that runs."""
    key = key_of(inputs, site)
    return "" if key is None else memory_of(inputs.query.device).decided(key)


def end_call(inputs: AttentionInputs, index: SparseIndex, site: int) -> None:
    """Remember what a call selected, where it ran sparse."""
    key = key_of(inputs, site)
    if key is not None:
        length = inputs.query.shape[2]
        memory = memory_of(inputs.query.device)
        memory.finish(key, lambda: causal_work_share(index, length))


def key_of(inputs: AttentionInputs, site: int) -> Key | None:
    """What calls are remembered by; None for those that are not.

    Only whole causal prompts are: for others no dense attention is as fast as the model takes it to
    be. Prompts of about the same length share what is known.
    """
    query, keys, mask = inputs.query, inputs.key, inputs.mask
    plain = mask.causal and mask.window == 0 and mask.query_offset == 0 and mask.key_mask is None
    if site == 0 or not plain or query.shape[2] != keys.shape[2] or capturing(query.device):
        return None
    batch, heads, length, dim = query.shape
    return (site, query.dtype, batch, heads, keys.shape[1], dim, int(length).bit_length())


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def memory_of(device: torch.device) -> WorkMemory:
    """What is remembered of one device's attentions."""
    pinned = device.type == "cuda"
    with torch.inference_mode(False):  # later calls write to it outside of that mode, too
        slots = torch.empty(READINGS, dtype=torch.float32, device="cpu", pin_memory=pinned)
    free = [0]

    def start(share: Tensor) -> Reading:
        place = free[0] = (free[0] + 1) % READINGS
        return PinnedReading(share, slots[place])

    return WorkMemory(start)


class PinnedReading:
    """A number on its way from a GPU into pinned memory, behind an event."""

    def __init__(self, share: Tensor, slot: Tensor) -> None:
        self.slot = slot
        self.event: torch.cuda.Event | None = None
        slot.copy_(share, non_blocking=True)
        if share.is_cuda:
            with torch.cuda.device(share.device):
                self.event = torch.cuda.Event()
                self.event.record()

    def ready(self) -> bool:
        return self.event is None or self.event.query()

    def value(self) -> float:
        return float(self.slot)
