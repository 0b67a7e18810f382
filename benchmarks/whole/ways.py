"""Every way to run the job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULES = "merak's rules"
QUIET = 0.15
"""Share of all cores that other processes may have in a row that counts as measured."""


@dataclass(frozen=True)
class Way:
    """Degrees and a schedule, or the rules of Merak: equal blocks, 1F1B, everything computed again."""

    dp: int
    pp: int
    tp: int
    schedule: str
    rules: bool = False

    @property
    def name(self) -> str:
        return RULES if self.rules else self.schedule


def ways() -> Iterator[Way]:
    """Every factorisation of 8 with the schedules that its pipeline can have."""
    for pp in (1, 2, 4, 8):
        for tp in (t for t in (1, 2, 4, 8) if 8 % (pp * t) == 0):
            dp = 8 // pp // tp
            schedules = {1: ("1f1b",), 8: ("1f1b", "zb-h1", "auto")}.get(pp, ("1f1b", "interleaved", "zb-h1", "auto"))
            for schedule in schedules:
                yield Way(dp, pp, tp, schedule)
            yield Way(dp, pp, tp, "1f1b", rules=True)


def fastest(path: Path) -> list[dict[str, Any]]:
    """The row of each way in which its step was fastest: what others do on the machine only adds."""
    rows = dict[tuple[Any, ...], dict[str, Any]]()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        way = tuple(row[key] for key in ("dp", "pp", "tp", "name"))
        if way not in rows or row["measured"] < rows[way]["measured"]:
            rows[way] = row
    return list(rows.values())


def measured_well(path: Path) -> set[tuple[Any, ...]]:
    """Degrees and names of the ways that were measured while the machine was quiet."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {tuple(row[key] for key in ("dp", "pp", "tp", "name")) for row in rows if row["others"] <= QUIET}
