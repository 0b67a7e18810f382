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
PLACES = ("README.md", "benchmarks/pipeline/README.md")


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


def _setting(setting: dict[str, Any]) -> str:
    return "Setting: " + ", ".join(f"{key} {value}" for key, value in setting.items()) + "."


TABLES = {"pipeline": pipeline, "overhead": overhead}


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
