"""The short set: what `make bench` runs, in 15 minutes on two cores, and the tables from it.

    python benchmarks/short.py                  everything
    python benchmarks/short.py pipeline zero    only these

A part that fails or takes twice its time is named at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """A script, on how many processes, and the seconds it may take where nothing else runs."""

    script: str
    seconds: int
    words: tuple[str, ...] = ()
    processes: int = 0
    """0: it starts its processes by itself."""


PARTS = {
    "tracing": Part("tracing/main.py", 25),
    "schedules": Part("schedules/main.py", 10),
    "engine": Part("pipeline/overhead.py", 40, processes=2),
    "pipeline": Part("pipeline/main.py", 190, processes=2),
    "paced": Part("paced/main.py", 110, ("--ranks", "4")),
    "tensor_parallel": Part("tensor_parallel/main.py", 170, ("mlp", "llama")),
    "zero": Part("zero/main.py", 240, processes=2),
    "overhead": Part("overhead/main.py", 110),
}
"""At most 900 seconds in all."""


def command(part: Part) -> list[str]:
    """What starts it."""
    job = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(part.processes)]
    return [sys.executable, *(job if part.processes else []), str(HERE / part.script), *part.words]


def main() -> int:
    """Run the parts, say how long each took, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar=" | ".join(PARTS))
    names = parser.parse_args().parts
    if unknown := set(names) - {*PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    took, failed = dict[str, float](), dict[str, str]()
    for name in names:
        begin = time.monotonic()
        try:
            run = subprocess.run(command(PARTS[name]), env=environment, timeout=2 * PARTS[name].seconds)
            if run.returncode:
                failed[name] = f"ended with {run.returncode}"
        except subprocess.TimeoutExpired:
            failed[name] = f"not through after {2 * PARTS[name].seconds} s"
        took[name] = time.monotonic() - begin
    subprocess.run([sys.executable, str(HERE / "tables.py")], check=True)
    print("\n| part | seconds | foreseen |\n|---|---:|---:|")
    for name, seconds in took.items():
        print(f"| {name} | {seconds:.0f} | {PARTS[name].seconds} |")
    print(f"| in all | {sum(took.values()):.0f} | {sum(PARTS[name].seconds for name in took)} |")
    for name, why in failed.items():
        print(f"{name}: {why}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
