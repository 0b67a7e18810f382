"""What tensor parallelism costs beside the peers, and how much of its communication is hidden. See README.md.

python benchmarks/tensor_parallel/main.py              all questions; the second and third need root
python benchmarks/tensor_parallel/main.py llama        only that one; what is known of the others stays
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from lab import PROFILES, Hosts, missing, two_hosts  # noqa: E402

SHARE = 0.42
"""Of a plain step on the shaped link that is to be communication; the issue is overlap where it is 30 to 50%."""


ROUNDS = 7


def mlp(hosts: Hosts) -> dict[str, Any]:
    """CPU of a small pass, on one host."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with said() as out:
        subprocess.run([*run, str(HERE / "mlp.py"), str(out)], check=True, env=environment, timeout=600)
        return json.loads(out.read_text())


def overlap(hosts: Hosts) -> dict[str, Any]:
    """Steps with and without shares: at no limit, then at one that makes communication that share of a plain step."""
    unshaped = asked(hosts, "overlap.py")
    seconds = unshaped["rows"]["plain"]["milliseconds"] / 1e3 * SHARE / (1 - SHARE)
    rate = 8 * unshaped["bytes a step"] / seconds
    hosts.shape(rate)
    return {
        "megabits per second": round(rate / 1e6, 1), "unshaped": unshaped, "shaped": asked(hosts, "overlap.py"),
    }  # fmt: skip


def llama(hosts: Hosts) -> dict[str, Any]:
    """Steps beside the peers'."""
    found = {}
    for profile in ("unshaped", "1 Gbit"):
        hosts.shape(PROFILES[profile])
        found[profile] = asked(hosts, "llama.py", str(ROUNDS))
    return found


def asked(hosts: Hosts, script: str, *words: str) -> dict[str, Any]:
    """What a job of one process on each host says."""
    with said() as out:
        hosts.torchrun([str(HERE / script), str(out), *words], timeout=900)
        return json.loads(out.read_text())


@contextmanager
def said() -> Iterator[Path]:
    """A file for what a job has found."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "found.json"


QUESTIONS = {"mlp": mlp, "overlap": overlap, "llama": llama}


def main() -> None:
    """Run the jobs and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), metavar=" | ".join(QUESTIONS))
    names = parser.parse_args().questions
    if unknown := set(names) - {*QUESTIONS}:
        parser.error(f"no question {', '.join(unknown)}: there are {', '.join(QUESTIONS)}")
    path, why = HERE / "results.json", missing()
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found["setting"] = setting()
    if why:
        print(f"the lab's hosts were left out: {why}")
    for name in names:
        if name == "mlp" or not why:
            with nullcontext(Hosts((), ())) if name == "mlp" else two_hosts() as hosts:
                found[name] = QUESTIONS[name](hosts)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def setting() -> dict[str, object]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "load average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
