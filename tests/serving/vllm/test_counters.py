"""What was sparse is counted, and shown in vLLM's metrics where these are of several processes."""

from __future__ import annotations

import pytest

from mpass.serving.vllm.counters import DESCRIPTIONS, Counters, metrics
from tests.helpers.processes import run_python


def test_counts_are_plain_numbers_by_name():
    counters = Counters()
    counters.add("sparse", 30)
    counters.record(0.25, dense=False)
    counters.record(0.75, dense=True)
    counts = counters.as_dict()
    assert counts["sparse"] == 30 and counts["ran_dense"] == 1 and counts["density"] == 0.5
    assert set(DESCRIPTIONS) < set(counts) and Counters().as_dict()["density"] == 1.0


def test_every_count_is_shown_as_it_is_made():
    shown = []
    Counters(show=lambda name, count: shown.append((name, count))).add("prefills", 2)
    assert shown == [("prefills", 2)]


def test_no_metrics_are_made_where_nothing_collects_them(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert metrics() is None


def test_counts_of_another_process_are_collected(tmp_path):
    pytest.importorskip("prometheus_client")
    count = "from mpass.serving.vllm import process_counters as c; c().add('sparse', 7)"
    run_python("-c", count, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    collect = (
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess; "
        "r = CollectorRegistry(); multiprocess.MultiProcessCollector(r); "
        "print(generate_latest(r).decode())"
    )
    out = run_python("-c", collect, PROMETHEUS_MULTIPROC_DIR=str(tmp_path)).stdout
    assert "mpass:sparse_total 7.0" in out
