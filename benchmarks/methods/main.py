"""What does each method save and cost? See README.md.

    OMP_NUM_THREADS=1 python benchmarks/methods/main.py [ROW ...]   measure, write results.json and the table
    python benchmarks/methods/main.py --table [--check]   only the table, from results.json

Times are of CPU time, the best or the middle of several turns; peaks are those of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import rows

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results.json"


def alone(name: str) -> dict[str, Any]:
    """Run a row in a process of its own, so that its peak is its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(HERE / "rows.py"), name], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(f"{name}:\n{run.stdout}{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def table(data: dict[str, Any]) -> str:
    """A line for each method and bar."""
    lines = ["| method | measured on | what | bar | found |", "|---|---|---|---:|---:|"]
    for name in rows.ROWS:
        for row in data["rows"].get(name, {}).get("lines", ()):
            lines.append("| " + " | ".join([rows.ROWS[name].title, *row]) + " |")
    setting = ", ".join(f"{key} {value}" for key, value in data["setting"].items())
    return "\n".join([*lines, "", f"Setting: {setting}."])


def fill(text: str, check: bool) -> int:
    """Put the table into the README, or say whether it is there."""
    old = PAGE.read_text(encoding="utf-8")
    new = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", old, flags=re.DOTALL)
    if check:
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def main() -> int:
    """Measure, or only write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[[], *rows.ROWS], default=[])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "setting": {}}
    if not asked.table:
        for name in asked.rows or rows.ROWS:
            found = alone(name)
            data = known()  # another process may have measured other rows meanwhile
            data["rows"][name] = found
            RESULTS.write_text(json.dumps(data, indent=1) + "\n")
            print(name, found, flush=True)
    return fill(table(known()), asked.check)


def known() -> dict[str, Any]:
    """What was measured so far, and where."""
    if RESULTS.exists():
        return json.loads(RESULTS.read_text())
    import torch

    machine = f"{os.cpu_count()} cores, {platform.machine()}, 1 thread"
    return {"rows": {}, "setting": {"torch": torch.__version__, "machine": machine}}


if __name__ == "__main__":
    sys.exit(main())
