"""What does the engine reach on one GPU? See README.md.

    python benchmarks/gpu/main.py              everything, in under 8 minutes; writes results.json and the table
    python benchmarks/gpu/main.py --dry-run    the same code on the CPU at a tiny size; writes nothing

Each row runs in a process of its own, so that its peak memory is its own and its failure takes no other with it.
Without a CUDA device the benchmark says so and ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
import questions  # noqa: E402

PAGE, RESULTS = HERE / "README.md", HERE / "results.json"
LIMIT = 450.0
"""Seconds for all rows; those that do not fit are named. Each has a limit of its own too."""


def alone(name: str, dry: bool, limit: float) -> dict[str, Any]:
    """A row in a process of its own: what it found, or why it found nothing."""
    words = [sys.executable, str(HERE / "questions.py"), name, *(["--dry-run"] if dry else [])]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, wrong = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not through after {limit:.0f} s"}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # ranks and compilers that it started too
        run.wait()
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        return {"failed": (wrong.strip().splitlines() or ["it said nothing"])[-1][:300]}
    return json.loads(lines[-1])


def measure(names: Sequence[str], dry: bool) -> dict[str, Any]:
    """All rows that fit into the time."""
    end, found = time.monotonic() + LIMIT, dict[str, Any]()
    for name in names:
        left = end - time.monotonic()
        limit = min(left, questions.ROWS[name].most)
        found[name] = alone(name, dry, limit) if left > 5 else {"failed": "no time was left"}
        print(name, json.dumps(found[name]), flush=True)
    return found


def table(data: dict[str, Any]) -> str:
    """A line for each number beside its bar."""
    lines = ["| question | what | bar | found |", "|---|---|---:|---:|"]
    for name, found in data["rows"].items():
        title = questions.ROWS[name].title
        if "failed" in found:
            lines.append(f"| {title} | not measured: {found['failed']} | | |")
        lines += ["| " + " | ".join([title, *line]) + " |" for line in found.get("lines", ())]
    setting = ", ".join(f"{key} {value}" for key, value in data["setting"].items())
    return "\n".join([*lines, "", f"Setting: {setting}."])


def setting() -> dict[str, str]:
    """Where it ran."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> int:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *questions.ROWS], default=[])
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args()
    import torch

    if not asked.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here: run this on a machine with one GPU, or look at it with --dry-run")
        return 0
    found = measure(asked.rows or list(questions.ROWS), asked.dry_run)
    data: dict[str, Any] = {"setting": setting(), "rows": found}
    if asked.dry_run:
        print(table(data))
        return int(any("failed" in row for row in found.values()))
    if RESULTS.exists() and asked.rows:
        data["rows"] = json.loads(RESULTS.read_text())["rows"] | found
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    text = re.sub(
        r"(<!-- table -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{table(data)}\n{m[2]}",
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    PAGE.write_text(text)
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
