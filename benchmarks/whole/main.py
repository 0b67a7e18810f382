"""Does the planner choose the best of all layouts, and by how much are Merak's own rules beaten? See README.md.

    python benchmarks/whole/main.py                  what rows.jsonl lacks, and what others disturbed; needs root
    python benchmarks/whole/main.py --minutes 4      begin no way after that; the next run goes on
    python benchmarks/whole/main.py 2,2,2 4,2,1      only these degrees

Two hosts (network namespaces) of four paced devices each, 1 Gbit/s between them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from lab import missing, two_hosts  # noqa: E402
from pace import BETWEEN, DEVICES, FLOPS, MALLOC, SLOW  # noqa: E402
from ways import RULES, fastest, ways  # noqa: E402


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice against the best, and each layout's best way against Merak's rules on it."""
    own = [row for row in rows if row["name"] != RULES]
    chosen, best = min(own, key=lambda row: row["predicted"]), min(own, key=lambda row: row["measured"])
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    gains = dict[str, float]()
    for rule in (row for row in rows if row["name"] == RULES):
        same = [row for row in own if all(row[axis] == rule[axis] for axis in ("dp", "pp", "tp"))]
        ours = min(same, key=lambda row: row["predicted"])
        gains[f"{rule['dp']} x {rule['pp']} x {rule['tp']}"] = round(rule["measured"] / ours["measured"], 3)
    return {
        "chosen": chosen, "best": best, "chosen to best": round(chosen["measured"] / best["measured"], 3),
        "mean error of the prediction": round(sum(errors) / len(errors), 3), "merak's rules to ours": gains,
    }  # fmt: skip


def main() -> int:
    """Run the job on the two hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("degrees", nargs="*", help="dp,pp,tp")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--again", action="store_true", help="forget the rows that are known")
    args = parser.parse_args()
    if why := missing():
        print(f"this needs two hosts: {why}")
        return 1
    out = HERE / "rows.jsonl"
    if args.again or not out.exists():
        out.write_text("")
    with two_hosts() as hosts:
        hosts.shape(8 * BETWEEN / SLOW)
        words = [str(HERE / "job.py"), str(out), str(args.minutes), *args.degrees]
        hosts.torchrun(words, timeout=3000, processes=DEVICES, environment=MALLOC)
    rows, due = fastest(out), sum(1 for _ in ways())
    setting = {
        "paced GFLOP/s": FLOPS / 1e9, "Mbit/s of a host": 8 * BETWEEN / 1e6, "times slower": SLOW,
        "ways": f"{len(rows)} of {due}", "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    found = {"setting": setting, "missing": due - len(rows), **summary(rows), "rows": rows}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
