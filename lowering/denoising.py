"""What attention keeps over the steps of a diffusion sampler, and who says which step it is.

Between two steps the attention of a diffusion transformer changes little. At some steps it is
computed whole; between them only selected keys are, and what the others added at the last whole
step, the residual, is added again (DiTFastAttn, arXiv 2406.08552). The ratio of softmax
denominators that goes with it as an option is that of Re-ttention (arXiv 2505.22918). What is kept
lives in the object of the `with` block, never in a graph: one compiled graph serves all steps, and
its ops ask that object (lowering/steps_op.py).

Letters: B batch, H query heads, Nq queries, Dv value dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpass.errors import ArgumentError, DenoisingMemoryError
from mpass.lowering.denoising_plan import DenoisingPlan, Keep, Schedule, StepRule
from mpass.lowering.denoising_probe import Probe
from mpass.lowering.index import SparseIndex

Key = tuple[object, ...]

T = TypeVar("T")

MEMORY = 4 * 2**30
"""Bytes that a run may keep where nothing else is said."""


@dataclass(slots=True, eq=False)
class Kept:
    """What one attention keeps: of its last whole step, and of the one before for a slope.

    tensors: residuals or outputs [B, H, Nq, Dv] by step, the last one at the end; ratio: fp32
    [B, H, Nq], the share of each row's softmax that the selected keys have; index: the keys that
    the residual was taken for; dense_reason: why the attention is dense at every step, or "".
    """

    signature: Key
    tensors: list[tuple[int, Tensor]] = field(default_factory=list)
    ratio: Tensor | None = None
    index: SparseIndex | None = None
    dense_reason: str = ""

    def at(self, step: int) -> Tensor:
        """What is kept, carried on to a step along the line through the last two."""
        last, now = self.tensors[-1]
        if len(self.tensors) == 1:
            return now
        before, then = self.tensors[0]
        return torch.lerp(then, now, (step - before) / (last - before))


@dataclass(eq=False)
class DenoisingRun:
    """A sampling that is going on: which step it is, and what is kept; made by `denoising`.

    schedule: what is whole when. step: the step now, from 0 on; None while nobody has told one, and
    attention is dense then. places: the attentions of a step, numbered as they first run.
    probe: measures what could be left out instead of leaving anything out.
    """

    schedule: Schedule | DenoisingPlan
    memory: int = MEMORY
    step: int | None = None
    kept: dict[Key, Kept] = field(default_factory=dict)
    needed: dict[Key, int] = field(default_factory=dict)
    calls: dict[Key, int] = field(default_factory=dict)
    asked: bool = False
    places: dict[Key, int] = field(default_factory=dict)
    probe: Probe | None = None

    def begin(self) -> None:
        """Start at step 0 with nothing kept: another prompt, another scheduler."""
        self.forget()
        self.places.clear()
        self.step = 0

    def forget(self) -> None:
        """Drop what is kept, in the middle of a sampling: the next step of each site is whole."""
        self.kept.clear()
        self.needed.clear()
        self.calls.clear()

    def advance(self) -> None:
        """Go on to the next step. Raises DenoisingMemoryError if what it needs is over `memory`."""
        self.step = 0 if self.step is None else self.step + 1
        self.calls.clear()
        self.check_memory()

    def over(self, timesteps: Iterable[T]) -> Iterator[T]:
        """The timesteps of a sampling loop, each of them one step: `for t in run.over(times)`."""
        self.begin()
        for count, timestep in enumerate(timesteps):
            if count:
                self.advance()
            yield timestep

    @property
    def num_bytes(self) -> int:
        """Memory that is kept now."""
        tensors = [t for kept in self.kept.values() for _, t in kept.tensors]
        tensors += [kept.ratio for kept in self.kept.values() if kept.ratio is not None]
        indexes = sum(kept.index.num_bytes() for kept in self.kept.values() if kept.index)
        return indexes + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def numbered(self, site: Key) -> Key:
        """The key of a call of a site: its place among the calls of this step goes with it.

        So two calls per step, as of guidance, have a state each.
        """
        self.asked = True
        number = self.calls.get(site, 0)
        self.calls[site] = number + 1
        return (*site, number)

    def place(self, key: Key) -> int:
        """The number of a call among the attentions of a step, in the order of their first runs."""
        return self.places.setdefault(key, len(self.places))

    def rule(self, key: Key, step: int) -> StepRule:
        """What a call does at a step. Raises ArgumentError if no plan is made for it."""
        return self.schedule.at(step, self.place(key))

    def check_memory(self) -> None:
        """Raise DenoisingMemoryError if the sites that are known keep more than is allowed."""
        total = sum(self.needed.values())
        if total > self.memory:
            raise DenoisingMemoryError(total, self.memory, len(self.needed))


RUN: ContextVar[DenoisingRun | None] = ContextVar("mpass_denoising", default=None)

GRAPH: ContextVar[Key] = ContextVar("mpass_denoising_graph", default=())
"""What tells apart graphs, and layers that share one: of the graph that runs now."""


@contextmanager
def denoising(
    steps: int,
    *,
    full: int | None = None,
    every: int = 6,
    keep: Keep = "residual",
    order: int = 0,
    ratio: bool = False,
    decay: float = 0.04,
    memory: int = MEMORY,
    scheduler: Any = None,
    plan: DenoisingPlan | None = None,
) -> Iterator[DenoisingRun]:
    """Keep what attention leaves out over the steps of a sampler that runs in this block.

    It concerns models that were compiled with `options={"denoising": True, "pattern": ...}`, and
    their attention that is not causal. Somebody has to tell each step: a scheduler of diffusers, a
    loop over `run.over(timesteps)`, or calls of `run.begin()` and `run.advance()`. Yields the run.

    steps: of the sampler; those beyond are whole. full: so many at the start are whole, a tenth by
    default. every: after these, one step of so many is whole.
    keep: "residual", what the keys that are left out added at the last whole step; "output", the
    whole output, so that nothing is computed in between; "nothing", plain sparse attention.
    order: 0 takes what is kept as it is, 1 goes on along the line through the last two (twice the
    memory; the selected keys are those of the first whole step that is kept, to the end).
    ratio: scale sparse outputs by the share of the softmax that selected keys had, plus `decay`
    per step since (Re-ttention), at most 1.
    memory: bytes that may be kept. scheduler: an object with `step` and `set_timesteps`, as those
    of diffusers, whose calls tell the steps.
    plan: of `mpass.search_denoising`, for so many steps: says for each attention what the numbers
    from `full` to `decay` say for all, which are of no effect then.

    Raises ArgumentError for a number that cannot be, and DenoisingMemoryError.
    """
    first = max(1, steps // 10) if full is None and isinstance(steps, int) else full
    schedule = Schedule(steps, first, every, keep, order, ratio, decay)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 0:
        raise ArgumentError("memory", memory, "bytes, an int >= 0")
    if plan is not None and plan.steps != steps:
        raise ArgumentError("plan", f"of {plan.steps} steps", f"a plan of {steps} steps")
    run = DenoisingRun(schedule if plan is None else plan, memory)
    with running(run, scheduler):
        yield run
    if run.asked and run.step is None:
        warnings.warn(
            "mpass.denoising: nobody told a step, so attention was dense: give it the scheduler, "
            "or loop over run.over(timesteps)",
            stacklevel=3,
        )


@contextmanager
def running(run: DenoisingRun, scheduler: Any = None) -> Iterator[None]:
    """Let attention ask a run which step it is, and a scheduler tell it."""
    with ExitStack() as stack:
        if scheduler is not None:
            run.begin()
            stack.enter_context(followed(scheduler, run))
        token = RUN.set(run)
        stack.callback(RUN.reset, token)
        yield


@contextmanager
def followed(scheduler: Any, run: DenoisingRun) -> Iterator[None]:
    """Let a scheduler's calls tell the steps: `set_timesteps` begins, each `step` ends one."""
    names: dict[str, Callable[[], None]] = {"set_timesteps": run.begin, "step": run.advance}
    for name in names:
        if not callable(getattr(scheduler, name, None)):
            raise ArgumentError("scheduler", scheduler, "an object with step and set_timesteps")
    with ExitStack() as stack:
        for name, tell in names.items():
            own = vars(scheduler).get(name)
            setattr(scheduler, name, told(getattr(scheduler, name), tell))
            restore = (delattr, scheduler, name) if own is None else (setattr, scheduler, name, own)
            stack.callback(*restore)
        yield


def told(method: Callable[..., Any], tell: Callable[[], None]) -> Callable[..., Any]:
    """A method that tells when it has run."""

    def run(*arguments: Any, **settings: Any) -> Any:
        result = method(*arguments, **settings)
        tell()
        return result

    return run


def identified(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled graph that says which one it is while it runs, and with which weights.

    Layers that are alike may share a graph, and so may models: what is kept of one must not serve
    the other. Their first parameter tells them apart.
    """
    graph = object()

    def run(*arguments: Any) -> Any:
        weight = next((a for a in arguments if isinstance(a, torch.nn.Parameter)), None)
        token = GRAPH.set((graph, id(weight)))
        try:
            return compiled(*arguments)
        finally:
            GRAPH.reset(token)

    return run
