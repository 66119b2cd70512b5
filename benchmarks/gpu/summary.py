"""What the figures say: the goals of the GPU kernels against what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Rows = dict[str, dict[str, Any]]
Goal = tuple[str, float, bool]


def table(rows: dict[str, dict[str, Any]], only: str) -> str:
    """One line per row of the results, checks summed up in one."""
    checks = {name: row for name, row in rows.items() if name.startswith("check/")}
    good = sum(bool(row.get("ok")) for row in checks.values())
    lines = [f"checks: {good} of {len(checks)} right"]
    lines += [f"  wrong: {name} {short(row)}" for name, row in checks.items() if not row.get("ok")]
    shown = {name: row for name, row in rows.items() if name not in checks and only in name}
    width = max((len(name) for name in shown), default=0)
    lines += [f"{name:<{width}}  {short(row)}" for name, row in shown.items()]
    return "\n".join([*lines, *bars(rows)])


def short(row: dict[str, Any]) -> str:
    """A row's figures in one line."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
        if key != "date"
    )


def bars(rows: Rows) -> list[str]:
    """One line per goal that the rows can answer."""
    return [
        f"{'met   ' if met else 'MISSED'}  {goal}: {value:.3g}" for goal, value, met in goals(rows)
    ]


def goals(rows: Rows) -> Iterator[Goal]:
    """What is asked, what was measured, whether that is enough."""
    ends = {name.rsplit("/", 1)[1] for name in rows if "/" in name}
    lengths = sorted(int(end) for end in ends if end.isdigit())
    for length in lengths:
        yield from rates(rows, length)
        yield from against_dense(rows, length)
    share = figure(rows, "estimation/vertical slash/131072", "share")
    if share:
        yield "131072: estimation over attention, vertical slash", share, share <= 0.1
    index = figure(rows, "estimation/vertical slash/1048576", "index_share_of_kv")
    if index:
        yield "1048576: index over K and V, vertical slash", index, index <= 0.02
    for name, row in rows.items():
        if name.startswith("capture/") and "ok" in row:
            yield f"{name}: difference of the replayed graph", row["difference"], bool(row["ok"])


def rates(rows: Rows, length: int) -> Iterator[Goal]:
    """Attention alone, from 32K on: at a fixed density against all blocks by the same kernel."""
    full = figure(rows, f"attention/density 1/{length}", "tflops")
    for density in (0.05, 0.2):
        rate = figure(rows, f"attention/density {density:g}/{length}", "tflops")
        if length >= 32768 and rate:
            yield f"{length}: TFLOP/s at density {density:g}", rate, rate >= 300
            if full:
                share = rate / full
                yield f"{length}: rate at density {density:g} over that at 1", share, share >= 0.8


def against_dense(rows: Rows, length: int) -> Iterator[Goal]:
    """Whole ops and compiled programs against the best dense attention."""
    known = (figure(rows, f"attention/{name}/{length}") for name in ("sdpa", "flash", "cudnn"))
    dense = min((spent for spent in known if spent), default=0.0)
    for at, density, least in ((131072, 0.05, 8.0), (1048576, 0.01, 25.0)):
        spent = figure(rows, f"whole/block top k {density:g}/{length}")
        if length == at and spent and dense:
            speedup = dense / spent
            yield f"{length}: whole op at density {density:g} over SDPA", speedup, speedup >= least
    for inputs in ("", "plain inputs/"):
        slowdown = figure(rows, f"crossover/{inputs}{length}", "slowdown")
        if slowdown:
            goal = (
                f"{length}: {inputs.replace('/', ', ')}time of the compiled default over inductor's"
            )
            yield goal, slowdown, slowdown <= 1.03
    sparse, inductor = (figure(rows, f"prefill/{b}/{length}") for b in ("minference", "inductor"))
    if sparse and inductor:
        speedup = inductor / sparse
        yield f"{length}: prefill of the model over inductor's", speedup, speedup >= 0.97


def figure(rows: Rows, name: str, key: str = "ms") -> float:
    """A figure of a row; 0.0 where it was not measured."""
    return float(rows.get(name, {}).get(key, 0.0))
