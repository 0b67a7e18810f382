"""Seconds of a piece of Python, and the memory that it takes at its most."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cpu(work: Callable[[], Any], turns: int = 15) -> float:
    """CPU seconds of one call, the middle of some."""
    found = []
    for _ in range(turns):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def resident(word: str = "VmRSS") -> int:
    """Bytes of this process now; with ``VmHWM`` the most so far, of this program alone: what getrusage says of a
    process begins with the memory of the one that started it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(word))
    return int(line.split()[1]) * 1024


def peak(work: str, **environment: str) -> int:
    """Resident bytes that a piece of Python adds at its most, in a process of its own with this environment.

    What stands before the mark prepares, what follows is counted.
    """
    prepare, _, rest = work.partition("# --\n")
    code = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
import measure, torch
torch.set_num_threads(1)
{prepare}
open("/proc/self/clear_refs", "w").write("5")
before = measure.resident()
{rest}
print(measure.resident("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                         env={**os.environ, **environment})  # fmt: skip
    assert not run.returncode, run.stderr
    return int(run.stdout.split()[-1])
