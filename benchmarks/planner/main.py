"""Is the planner's answer what was measured? Every published figure beside ours.

python -m benchmarks.planner.main [TABLE ...]       writes benchmarks/planner/results.json
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.planner import memory, rows, schedules

RESULTS = Path(__file__).parent / "results.json"
TIMES: dict[str, Callable[[], Iterable[rows.Row]]] = {
    "sc21": rows.sc21, "korthikanti": rows.korthikanti, "h100": rows.h100, "vtrain": rows.vtrain,
    "zero_bubble": rows.zero_bubble,
}  # fmt: skip
FITTED = ("sc21", "korthikanti", "h100", "vtrain")
OUTLIERS = ("3.6B 8-8-1 mbs 64",)
"""Measured at twice the time of the same layout with half the micro-batch; known to vTrain's authors."""


def times(name: str) -> list[dict[str, Any]]:
    """The rows of a table; of those the constants were fitted to every other, counted over all tables."""
    every = [row for table in FITTED for row in TIMES[table]()]
    fitted = {(row.table, row.name) for i, row in enumerate(every) if i % 2 == 0 and row.name not in OUTLIERS}
    made: list[dict[str, Any]] = []
    for row in TIMES[name]():
        predicted = row.plan().step_seconds
        made.append({
            "name": row.name, "fitted": (row.table, row.name) in fitted, "measured": row.seconds,
            "predicted": round(predicted, 4), "error": round(predicted / row.seconds - 1, 4),
        })  # fmt: skip
        print(name, made[-1], flush=True)
    return made


def main(names: Sequence[str]) -> None:
    logging.disable(logging.WARNING)
    data: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [*TIMES, "memory", "schedules"]:
        if name in TIMES:
            data[name] = times(name)
        elif name == "memory":
            data[name] = [
                {"name": h.name, "published": round(h.published, 3), "predicted": round(h.predicted, 3),
                 "error": round(h.error, 4)}
                for h in memory.rows()
            ]  # fmt: skip
        else:
            data[name] = [
                {"name": n, "fitted": f, "published": a, "predicted": round(b, 3), "error": round(b / a - 1, 4)}
                for n, f, a, b in schedules.rows()
            ]
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
