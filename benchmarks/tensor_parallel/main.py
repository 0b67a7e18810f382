"""What tensor parallelism costs beside the peers, and how much of its communication is hidden. See README.md.

python benchmarks/tensor_parallel/main.py            both questions; the second needs root
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from lab import missing, two_hosts  # noqa: E402

SHARE = 0.42
"""Of a plain step on the shaped link that is to be communication; the issue is overlap where it is 30 to 50%."""


def main() -> None:
    """Run the jobs and write results.json."""
    overhead, plain, shaped = (HERE / f".{name}.json" for name in ("mlp", "plain", "shaped"))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, str(HERE / "mlp.py"), str(overhead)], check=True, env=environment, timeout=600)
    found = {"setting": setting(), "mlp": json.loads(overhead.read_text())}
    overhead.unlink()
    if why := missing():
        print(f"the shaped link was left out: {why}")
    else:
        with two_hosts() as hosts:
            hosts.torchrun([str(HERE / "overlap.py"), str(plain)], timeout=600)
            unshaped = json.loads(plain.read_text())
            seconds = unshaped["rows"]["plain"]["milliseconds"] / 1e3 * SHARE / (1 - SHARE)
            rate = 8 * unshaped["bytes a step"] / seconds
            hosts.shape(rate)
            hosts.torchrun([str(HERE / "overlap.py"), str(shaped)], timeout=900)
        found["overlap"] = {
            "megabits per second": round(rate / 1e6, 1), "unshaped": unshaped, "shaped": json.loads(shaped.read_text()),
        }  # fmt: skip
        plain.unlink()
        shaped.unlink()
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def setting() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
