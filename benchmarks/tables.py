"""Write the result tables of the benchmarks into the READMEs, from their JSON files.

    python benchmarks/tables.py          rewrite; `--check` only says whether they are up to date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("README.md", "benchmarks/pipeline/README.md", "benchmarks/paced/README.md")


def pipeline() -> str:
    """Step times beside the peers."""
    data = json.loads((ROOT / "benchmarks/pipeline/results.json").read_text())
    lines = [
        "| 2 processes | step, ms | CPU of the busier rank, ms | to torch 1F1B | to (one process / 2 + bubble) |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        numbers = (f"{row['milliseconds']:.0f}", f"{row['CPU milliseconds']:.0f}")
        ratios = (f"{row[k]:.2f}" for k in ("to torch 1F1B", "to half of one process + bubble"))
        lines.append(f"| {name} | " + " | ".join([*numbers, *ratios]) + " |")
    return "\n".join([*lines, "", _setting(data["setting"])])


def overhead() -> str:
    """What the engine itself costs."""
    data = json.loads((ROOT / "benchmarks/pipeline/overhead.json").read_text())
    lines = ["| engine overhead, CPU microseconds | per micro-batch | per action |", "|---|---|---|"]
    for name, row in data["overhead, microseconds"].items():
        lines.append(f"| {name} | {row['per micro-batch']} | {row['per action']} |")
    return "\n".join(lines)


def paced() -> str:
    """Simulated and measured steps of every schedule, on blocks that sleep."""
    data = json.loads((ROOT / "benchmarks/paced/results.json").read_text())
    unit, tables = data["setting"]["seconds of a rank's forward"], data["ranks"]
    heads = [f"{ranks} ranks: {what}" for ranks in tables for what in ("simulated, f", "measured, f", "ratio")]
    lines = ["| paced | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for rows in zip(*tables.values(), strict=True):
        times = ((row["simulated"] / unit, row["measured"] / unit, row["measured"] / row["simulated"]) for row in rows)
        cells = " | ".join(f"{a:.1f} | {b:.1f} | {c:.3f}" for a, b, c in times)
        lines.append(f"| {rows[0]['schedule']} | {cells} |")
    return "\n".join([*lines, "", _setting(data["setting"])])


def _setting(setting: dict[str, Any]) -> str:
    return "Setting: " + ", ".join(f"{key} {value}" for key, value in setting.items()) + "."


TABLES = {"pipeline": pipeline, "overhead": overhead, "paced": paced}


def filled(text: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite, or say what is stale."""
    stale = []
    for place in PLACES:
        path = ROOT / place
        old = path.read_text()
        new = filled(old)
        if new != old:
            stale.append(place)
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale:
        print("rewritten:" if "--check" not in sys.argv else "stale:", *stale)
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
