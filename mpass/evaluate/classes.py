"""The record of every class in transformers' mappings: built, run, sparse or why not.

A tiny model of each class runs eagerly and through the pass with full budgets. How many attentions
it has is counted while it runs eagerly, so that one that the pass has not seen is noticed.
"""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpass.errors import MissingPackageError
from mpass.evaluate.coverage import FULL_BUDGET, CompiledRun, largest_difference, run_compiled
from mpass.models.class_table import NOT_BUILT
from mpass.models.classes import (
    BY_HAND,
    CALL,
    LONG,
    TURNS,
    ModelClass,
    build_class,
    class_inputs,
    family_of,
    scenarios_of,
    turns_of,
)
from mpass.models.tiny import Scenario, main_output, real_rows

SECONDS = 180
"""Longest run of one class in one scenario."""

LEAST_KEYS = 200
"""Pictures, sound and latents have more tokens than this in tiny models, texts fewer."""

LONG_KEYS, LONG_SIDE = 2048, 3
"""Attentions of the scenario LONG have so many keys at least; the factor of sides that gives it."""

DEFAULTS: dict[str, Any] = {"inner_backend": "eager"}
"""Default options, but for what compiles the rest of a graph."""


@dataclass(frozen=True)
class ClassRecord:
    """What became of one class in one scenario.

    kind, model_type, architecture: the class. scenario: how it was called, "" if it was not.
    attentions: how many over the whole prompt ran eagerly, each a softmax over queries and keys or
    an SDPA. sites: attentions that the pass found, one that ran for several layers for each;
    sparse: of these. dense: reasons of the others, with how often each.
    breaks: of Dynamo's graph. difference: largest to eager, at tokens that are no padding.
    of_dynamo: the same number where Dynamo's graph without the pass gives the output of
    the pass: some models choose another mask while they are compiled.
    not_run: why the class itself does not run here. error: what the pass raised.
    """

    kind: str
    model_type: str
    architecture: str
    scenario: str = ""
    attentions: int = 0
    sites: int = 0
    sparse: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    breaks: int = 0
    difference: float = 0.0
    of_dynamo: float = 0.0
    not_run: str = ""
    error: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The class, as its mapping names it."""
        return f"{self.kind}:{self.model_type}"

    @property
    def equal(self) -> bool:
        """Whether the output is that of eager, or of the graph that Dynamo made (fp32, 1e-4)."""
        near = self.difference <= 1e-4 or self.difference == self.of_dynamo
        return not self.error and not self.not_run and near


class CountAttentions(TorchFunctionMode):
    """Counts the attentions that run over a whole prompt.

    queries, keys: the lengths that make one count.
    """

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            self.count += (query.shape[-2], key.shape[-2]) == (self.queries, self.keys)
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        if name == "multi_head_attention_forward":  # inputs [N, B, E] or [N, E]
            query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            self.count += (query.shape[0], key.shape[0]) == (self.queries, self.keys)
            with torch._C.DisableTorchFunction():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if name == "softmax" and isinstance(result, Tensor) and result.dim() >= 3:
            self.count += tuple(result.shape[-2:]) == (self.queries, self.keys)
        return result


class CountLong(TorchFunctionMode):
    """Counts the calls of SDPA from a number of queries and keys on."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            query, key = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            self.count += min(query.shape[-2], key.shape[-2]) >= self.least
        return func(*args, **kwargs)


def cover_classes(
    entries: Iterable[ModelClass], only: Collection[str] | None = None
) -> Iterator[ClassRecord]:
    """Records of classes, one by one as they are made; one that is not built has one record.

    only: names of scenarios, of those that a class has.
    """
    for entry in entries:
        if entry.kind in BY_HAND:
            wanted = [CALL] if only is None else [s for s in (CALL, LONG) if s in only]
            yield from (cover_by_hand(entry, scenario) for scenario in wanted)
            continue
        try:
            model = build_class(entry)
        except Exception as error:
            yield ClassRecord(
                entry.kind, entry.model_type, entry.architecture, not_run=why_not(entry, error)
            )
            continue
        for one in scenarios_of(entry, model):
            if only is None or one.name in only:
                yield cover_class(entry, model, one)


def cover_by_hand(entry: ModelClass, scenario: str = CALL) -> ClassRecord:
    """Run one call of a model that was made by hand, eagerly and through the pass.

    Attentions count from LEAST_KEYS keys on: of diffusion, shorter ones are those over the text. In
    the scenario LONG they count from LONG_KEYS on, and options are the default ones.
    """
    started = time.perf_counter()
    record: dict[str, Any] = {**asdict(entry), "scenario": scenario}
    long = scenario == LONG
    made = BY_HAND[entry.kind](LONG_SIDE if long else 1)[entry.model_type]
    try:
        with seeded():
            model, call = made.build(), made.call()
            with CountLong(LONG_KEYS if long else LEAST_KEYS) as counted:
                expected = main_output(model(**call))
    except MissingPackageError:
        raise
    except Exception as error:
        return ClassRecord(**record, not_run=why_not(entry, error))
    record["attentions"] = counted.count
    try:
        with seeded(), limit(SECONDS):
            run = run_compiled(model, call, options=DEFAULTS if long else FULL_BUDGET)
    except Exception as error:  # recorded, so that one class does not hide the others
        return ClassRecord(**record, error=f"{type(error).__name__}: {error}"[:500])
    least = LONG_KEYS if long else 0
    sites = [site for site in run.sites if min(site.queries, site.keys) >= least]
    return ClassRecord(
        **record,
        sites=len(sites) + run.again,
        sparse=sum(site.status == "sparse" for site in sites) + run.again,
        dense=dict(Counter(here(site.reason) for site in sites if site.status != "sparse")),
        breaks=run.breaks,
        difference=largest_difference(run.output, expected, None),
        seconds=round(time.perf_counter() - started, 2),
    )


def why_not(entry: ModelClass, error: BaseException) -> str:
    """Why a class does not run, in one line."""
    text = NOT_BUILT.get(entry.model_type) or " ".join(str(error).split())
    return text if entry.model_type in NOT_BUILT else f"{type(error).__name__}: {text}"[:200]


def cover_class(entry: ModelClass, model: nn.Module, scenario: Scenario) -> ClassRecord:
    """Run one class in one scenario, eagerly and through the pass."""
    started = time.perf_counter()
    record: dict[str, Any] = {**asdict(entry), "scenario": scenario.name}
    try:
        with seeded():
            *before, call = calls_of(entry, model, scenario)
            for earlier in before:
                model(**earlier)
            with CountAttentions(scenario.new, scenario.cached + scenario.new) as counted:
                expected = main_output(model(**call))
    except Exception as error:
        return ClassRecord(**record, not_run=why_not(entry, error))
    record["attentions"] = counted.count
    rows = real_rows(family_of(entry, model), call)
    if rows is not None and rows.shape != expected.shape[:2]:
        rows = None
    try:
        with seeded(), limit(SECONDS):
            run = run_compiled(model, *calls_of(entry, model, scenario))
        difference = largest_difference(run.output, expected, rows)
        if not difference <= 1e-4:
            with seeded(), limit(SECONDS):
                alone = without_pass(model, calls_of(entry, model, scenario))
            if largest_difference(alone, run.output, rows) <= 1e-4:
                record["of_dynamo"] = difference
    except Exception as error:  # recorded, so that one class does not hide the others
        return ClassRecord(**record, error=f"{type(error).__name__}: {error}"[:500])
    return ClassRecord(
        **record,
        **counts_of(run, counted.count),
        difference=difference,
        seconds=round(time.perf_counter() - started, 2),
    )


def counts_of(run: CompiledRun, attentions: int) -> dict[str, Any]:
    """The fields of a record that count what the pass found.

    attentions: how many ran eagerly. Where a graph breaks, one may have served several of them.
    """
    again = min(run.again, max(0, attentions - len(run.sites))) if run.breaks else 0
    return {
        "sites": len(run.sites) + again,
        "sparse": sum(site.status == "sparse" for site in run.sites) + again,
        "dense": dict(Counter(here(s.reason) for s in run.sites if s.status != "sparse")),
        "breaks": run.breaks,
    }


def here(reason: str) -> str:
    """A reason whose places are named from the installed packages on, alike on all machines."""
    return re.sub(r"/\S*site-packages/", "", reason)


def calls_of(entry: ModelClass, model: nn.Module, scenario: Scenario) -> list[dict[str, Any]]:
    """The calls of a scenario, of which the last one counts."""
    if scenario is TURNS:
        return turns_of(entry, model)
    return [class_inputs(entry, model, scenario)]


def without_pass(model: nn.Module, calls: list[dict[str, Any]]) -> Tensor:
    """What Dynamo's graphs give, run eagerly."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    return [main_output(compiled(**call)) for call in calls][-1]


@contextmanager
def seeded() -> Iterator[None]:
    """No gradients, and the same random numbers each time: some models draw their start."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer; without an effect in other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- files and tables -------------------------------------------------------------------------


def append(records: Iterable[ClassRecord], path: Path) -> None:
    """Add the records of a class to a file, one line of JSON each; a run goes on where it ends."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_records(path: Path) -> list[ClassRecord]:
    """The records of a file; none where there is no file yet."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [ClassRecord(**json.loads(line)) for line in lines if line.strip()]


def line(record: ClassRecord) -> str:
    """One record as a line of text."""
    name = f"{record.name:36} {record.scenario:16}"
    if record.not_run or record.error:
        return f"{name} {'not run: ' * bool(record.not_run)}{record.not_run or record.error}"
    reasons = "; ".join(f"{count} x {reason}" for reason, count in record.dense.items())
    return (
        f"{name} {record.sparse}/{record.sites} sparse of {record.attentions}, "
        f"{record.breaks} breaks, {record.difference:.1e}" + f"  [{reasons}]" * bool(reasons)
    )


def kind_of_reason(reason: str) -> str:
    """A reason without the place in the model's source that it names."""
    return re.sub(r" at \S+\.py:\d+(, in [\w.<>]+)?", "", reason)


@dataclass(frozen=True)
class ClassSummary:
    """Numbers over the records of one kind of class.

    classes: of the mapping; run: of these, built and run; differ: names of those with a difference
    or an error; attentions, sparse: over whole prompts in the plain scenarios; without: names of
    classes that have no attention over a whole prompt.
    """

    kind: str
    classes: int
    run: int
    differ: tuple[str, ...]
    attentions: int
    sparse: int
    without: tuple[str, ...]


def summarise(records: Iterable[ClassRecord]) -> list[ClassSummary]:
    """Numbers over each kind of class."""
    by_kind: dict[str, list[ClassRecord]] = {}
    for record in records:
        by_kind.setdefault(record.kind, []).append(record)
    found = []
    for kind, those in by_kind.items():
        names = {record.name for record in those}
        run = {record.name for record in those if not record.not_run}
        seen = {record.name for record in those if record.attentions or record.sites}
        found.append(
            ClassSummary(
                kind,
                classes=len(names),
                run=len(run),
                differ=tuple(
                    sorted({r.name for r in those if not r.not_run and not r.equal})
                ),
                attentions=sum(max(r.attentions, r.sites) for r in those),
                sparse=sum(r.sparse for r in those),
                without=tuple(sorted(run - seen)),
            )
        )  # fmt: skip
    return found
