"""Published steps and bytes beside the planner's: one row of each table here, all of them in benchmarks/planner."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from benchmarks.planner import memory, rows
from benchmarks.planner.main import RESULTS


@pytest.mark.parametrize(
    ("table", "name", "most"), [("sc21", "1.7B", 0.1), ("h100", "1.7", 0.1), ("vtrain", "3.6B 8-8-1 mbs 8", 0.1)]
)
def test_a_published_step_is_predicted(table: str, name: str, most: float):
    row = next(row for row in getattr(rows, table)() if row.name == name or row.name.startswith(name))
    assert row.plan().step_seconds == pytest.approx(row.seconds, rel=most)


@pytest.mark.slow
def test_published_memory_is_predicted():
    errors = [abs(held.error) for held in memory.rows()]
    assert fmean(errors) <= 0.03


BARS = {"sc21": 0.1, "h100": 0.1, "korthikanti": 0.1, "vtrain": 0.08, "memory": 0.03, "schedules": 0.05}


@pytest.mark.parametrize("table", BARS)
def test_the_recorded_results_keep_the_bars(table: str):
    """The rows that nothing was fitted to; where every row is one of those, all."""
    found = [row for row in json.loads(RESULTS.read_text())[table] if not row.get("fitted", False)]
    assert fmean(abs(row["error"]) for row in found) <= BARS[table]
